"""Private names of other libraries: each is there as we rely on it, and nothing outside `internals/` uses any.

An upgrade that renames one fails here first. What the mixins of the Trainer override or call can't stand apart: it is
listed here.
"""

import argparse
import ast
import atexit
import inspect
import re
import textwrap
import threading
from functools import cache
from pathlib import Path

import datasets
import evaluate
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import iterable_dataset
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedModel, Trainer

from hf_recycle.internals import of_accelerate, of_datasets, of_python, of_torch, of_transformers

ROOT = Path(__file__).parents[1]

TRAINER_METHODS = {
    "_clip_grad_norm": "self, model",
    "_finalize_training": "self, trial, num_train_samples, start_time",
    "_finish_current_push": "self",
    "_get_collator_with_removed_columns": "self, data_collator, description=None",
    "_get_dataloader": (
        "self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None"
    ),
    "_get_grad_norm": "self, model, grad_norm=None",
    "_get_num_items_in_batch": "self, batch_samples, device",
    "_get_output_dir": "self, trial",
    "_hp_search_setup": "self, trial",
    "_init_training_state": (
        "self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial"
    ),
    "_issue_warnings_after_load": "self, load_result",
    "_load_best_model": "self",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model=None",
    "_load_optimizer_and_scheduler": "self, checkpoint",
    "_load_rng_state": "self, checkpoint",
    "_load_scaler": "self, checkpoint",
    "_prepare_for_training": "self, max_steps, train_dataloader, resume_from_checkpoint",
    "_prepare_inputs": "self, inputs",
    "_push_from_checkpoint": "self, checkpoint_folder",
    "_remove_unused_columns": "self, dataset, description=None",
    "_run_epoch": (
        "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch"
    ),
    "_save": "self, output_dir=None, state_dict=None",
    "_save_checkpoint": "self, model, trial",
    "_save_optimizer_and_scheduler": "self, output_dir",
    "_save_rng_state": "self, output_dir",
    "_save_scaler": "self, output_dir",
}
"""Of `transformers.Trainer`: what the mixins override or call."""

TRAINER_ATTRIBUTES = {
    "_globalstep_last_logged",
    "_initial_global_step",
    "_total_loss_scalar",
    "_tr_loss",
}
"""Of `transformers.Trainer`: what the mixins read or set while it trains."""

METRIC_METHODS = {"_build_data_dir": "self", "_compute": "self, *, predictions=None, references=None, **kwargs"}
METRIC_NAMES = {"_data_dir_root", "_info", *METRIC_METHODS}
"""Of `evaluate.EvaluationModule`: `_info` and `_compute` are what its guide has subclasses define."""

ASKING = {"getattr", "hasattr", "setattr", "delattr", "get", "pop"}
"""Functions that take the name of an attribute as a string."""

DOCUMENTED = {"_exit", "_asdict", "_fields", "_replace"}
"""With an underscore and public all the same."""


def arguments(function) -> str:
    """The parameters of a function without their annotations."""
    signature = inspect.signature(function)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))[1:-1].replace(" = ", "=")


def private_names(cls: type) -> set[str]:
    """What a class sets or defines of its own, by its source."""
    return set().union(*(defined(node) for node in ast.parse(textwrap.dedent(inspect.getsource(cls))).body))


# ---- Trainer and Metric ----


@pytest.mark.parametrize("name", TRAINER_METHODS)
def test_the_trainers_private_methods_take_what_we_rely_on(name):
    assert arguments(getattr(Trainer, name)) == TRAINER_METHODS[name], f"transformers {transformers.__version__}"


def test_the_trainer_has_the_attributes_that_we_read_or_set():
    assert private_names(Trainer) >= TRAINER_ATTRIBUTES


def test_the_lists_name_all_that_the_mixins_use_of_the_trainer_and_no_more():
    of_trainer = private_names(Trainer)
    used = {name for path in package() for name in names_used(tree(path)) if name in of_trainer}
    assert used == TRAINER_METHODS.keys() | TRAINER_ATTRIBUTES


def test_a_metric_has_what_ours_overrides():
    assert private_names(evaluate.EvaluationModule) >= METRIC_NAMES
    assert issubclass(evaluate.Metric, evaluate.EvaluationModule)
    for name, parameters in METRIC_METHODS.items():
        assert arguments(getattr(evaluate.Metric, name)) == parameters


# ---- torch ----


def test_torch_counts_changes_in_place():
    values = torch.zeros(3)
    before = of_torch.version_of(values)
    values[:2].add_(1)
    assert of_torch.version_of(values) == before + 1


def test_torch_says_which_operations_change_their_arguments():
    assert of_torch.is_mutating(torch.ops.aten.normal_.default)
    assert not of_torch.is_mutating(torch.ops.aten.add.Tensor)


def test_torch_asserts_on_the_device():
    of_torch.assert_on_device(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        of_torch.assert_on_device(torch.tensor(False), "not fine")


def test_torch_knows_a_backward_pass():
    seen = []
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda _: seen.append(of_torch.is_in_backward()))
    leaf.sum().backward()
    assert seen == [True]
    assert not of_torch.is_in_backward()


def test_torch_says_who_decides_what_is_saved():
    assert of_torch.keeps_saved_tensors()
    with torch.autograd.graph.save_on_cpu():
        assert not of_torch.keeps_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not of_torch.keeps_saved_tensors()


def test_torch_knows_its_transforms():
    seen = []
    torch.func.vmap(lambda x: (seen.append(of_torch.transforms_are_active()), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not of_torch.transforms_are_active()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_keep_their_input(approximate):
    values = torch.randn(4, requires_grad=True)
    gelu = nn.functional.gelu(values, approximate=approximate)
    assert gelu.grad_fn.name() == "GeluBackward0"
    assert torch.equal(of_torch.saved_input(gelu.grad_fn), values)
    assert of_torch.saved_approximation(gelu.grad_fn) == approximate
    silu = nn.functional.silu(values)
    assert silu.grad_fn.name() == "SiluBackward0"
    assert torch.equal(of_torch.saved_input(silu.grad_fn), values)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
def test_onednn_multiplies():
    rows, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    assert torch.allclose(of_torch.linear_by_onednn(rows, weight, bias), rows @ weight.T + bias, atol=1e-5)


def test_dynamo_takes_a_dimension_that_may_be_dynamic():
    assert arguments(torch._dynamo.maybe_mark_dynamic) == "t, index"
    of_torch.may_be_dynamic(torch.ones(3), 0)


def test_modules_keep_hooks_by_kind():
    layer = nn.Linear(2, 2)
    before, behind, gradient = (lambda *_: None for _ in range(3))
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(behind)
    layer.register_full_backward_hook(gradient)
    assert of_torch.forward_hooks(layer) == [behind, before]
    assert set(of_torch.all_hooks([nn.ReLU(), layer])) == {before, behind, gradient}


def test_a_rebuilt_module_has_the_names_without_values_and_no_hooks():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    model.register_forward_hook(lambda *_: pytest.fail("a hook"))

    def copy(module):
        return of_torch.rebuilt(module, vars(module), torch.zeros_like, copy)

    fresh = copy(model)
    assert fresh[0](torch.ones(4, 2)).eq(0).all()
    assert not of_torch.all_hooks([fresh])
    assert fresh[0].bias is None
    assert fresh[1].running_var.eq(0).all()
    assert model[0].weight.ne(0).all()


def test_a_rebuilt_module_has_the_class_from_before_fsdp2():
    layer = nn.Linear(2, 3)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})  # as fully_shard does
    assert type(of_torch.rebuilt(layer, vars(layer), torch.zeros_like, nn.Identity)) is nn.Linear


# ---- transformers, accelerate, datasets, Python ----


def test_transformers_initialises_module_by_module():
    assert arguments(PreTrainedModel._init_weights) == "self, module"
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = BertForMaskedLM(config)
    layer = nn.Linear(300, 300)
    of_transformers.initialize(model, layer)
    assert layer.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert not layer.bias.any()
    kept = nn.Linear(3, 3)
    before = kept.weight.clone()
    for parameter in kept.parameters():
        setattr(parameter, of_transformers.INITIALIZED, True)
    of_transformers.initialize(model, kept)
    assert torch.equal(kept.weight, before)


def test_transformers_lists_classes_and_names_of_tensors(tmp_path):
    names = ("_no_split_modules", "_keys_to_ignore_on_save", "_keys_to_ignore_on_load_unexpected")
    assert all(hasattr(PreTrainedModel, name) for name in names)
    assert of_transformers.has_class_for(AutoModelForMaskedLM, BertConfig())
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = BertForMaskedLM(config)
    assert of_transformers.unsplit_classes(model)
    assert not of_transformers.is_from_files(model)
    model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert of_transformers.is_from_files(loaded)
    of_transformers.note_commit(loaded.config, "abc")
    assert "abc" not in loaded.config.to_json_string()


def test_accelerate_keeps_the_forward_that_it_wraps():
    AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer of another test
    layer = nn.Linear(2, 2)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(layer)
    assert "forward" in vars(prepared)
    assert of_accelerate.has_forward_of_accelerate(prepared)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_datasets_have_fingerprints_and_streams_their_parts():
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
    assert isinstance(of_datasets.fingerprint(dataset), str)
    stream = dataset.to_iterable_dataset()
    assert of_datasets.resumes_exactly(stream)
    assert not of_datasets.resumes_exactly(stream.shuffle(buffer_size=2))
    assert of_datasets.resumes_exactly(stream.map(dict))
    assert not of_datasets.resumes_exactly(stream.with_format("arrow"))
    assert not of_datasets.is_split_by_node(stream)
    assert of_datasets.is_split_by_node(split_dataset_by_node(stream, 0, 2))
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    assert unknown.features is None
    assert list(of_datasets.with_features(unknown).features) == ["text"]


@pytest.mark.parametrize("name", sorted(of_datasets.EXACT))
def test_datasets_has_the_streams_that_we_know(name):
    cls = getattr(iterable_dataset, name)
    assert issubclass(cls, iterable_dataset._BaseExamplesIterable)


def test_python_ends_in_two_steps():
    assert arguments(threading._shutdown) == ""
    assert callable(atexit._run_exitfuncs)


def test_a_parser_knows_its_flags_and_commands():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-o", "--output")
    assert list(of_python.flags_of(parser)) == ["-o", "--output"]
    assert not of_python.has_commands(parser)
    parser.add_subparsers()
    assert of_python.has_commands(parser)


# ---- DeepSpeed ----


@pytest.mark.slow  # the import alone takes seconds
def test_deepspeed_holds_masters_where_we_look():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import fragment_address, get_hp_fragment_mapping, link_hp_params, tensor_fragment

    assert {"lp_fragment_address", "optim_fragment"} <= tensor_fragment.__dataclass_fields__.keys()
    assert arguments(tensor_fragment.get_hp_fragment) == "self, optim_state_key=None"
    assert "start" in fragment_address.__dataclass_fields__
    assert "lp_param._hp_mapping = " in inspect.getsource(get_hp_fragment_mapping) + inspect.getsource(link_hp_params)
    assert "bit16_groups" in attributes(DeepSpeedZeroOptimizer)
    stage_3 = attributes(DeepSpeedZeroOptimizer_Stage3)
    assert {"fp32_partitioned_groups_flat", "grad_position", "sub_group_to_group_id", "optimizer"} <= stage_3
    assert "_z3_optimizer" in stage_3
    assert arguments(DeepSpeedZeroOptimizer_Stage3.get_param_id) == "self, param"
    assert {"ds_id", "ds_shape", "ds_tensor", "ds_persist", "partition", "all_gather"} <= attributes(Init)


def attributes(cls: type) -> set[str]:
    """Everything that the methods of a class set, on `self` and on parameters."""
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


# ---- Nowhere else ----


def package() -> list[Path]:
    """The modules of the package that must do without."""
    return sorted(set(ROOT.glob("hf_recycle/**/*.py")) - set(ROOT.glob("hf_recycle/internals/*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.endswith("__")


def function_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def is_own(value: ast.expr) -> bool:
    """Whether an attribute of `value` is one of `self`, of the class or of what it inherits from."""
    if isinstance(value, ast.Call):
        return function_name(value) == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


@cache
def defined(node: ast.AST) -> set[str]:
    """The private names that the classes within `node` define: themselves, methods, class attributes and attributes of
    `self`, also by `vars(self).update(_name=...)`."""
    found = set()
    for cls in (each for each in ast.walk(node) if isinstance(each, ast.ClassDef)):
        found |= {cls.name, *(each.arg for each in ast.walk(cls) if isinstance(each, ast.keyword) and each.arg)}
        for statement in cls.body:
            found |= {getattr(statement, "name", "")}
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        stored = (each for each in ast.walk(cls) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store))
        found |= {each.attr for each in stored if is_own(each.value)}
    return {name for name in found if is_private(name)}


@cache
def names_used(node: ast.AST) -> dict[str, list[ast.AST]]:
    """The private names that occur in code: as attributes, imported, as methods, as strings that ask for one."""
    found: dict[str, list[ast.AST]] = {}
    for each in ast.walk(node):
        names: list[object] = []
        if isinstance(each, ast.Attribute):
            names = [each.attr]
        elif isinstance(each, ast.FunctionDef):
            names = [each.name]
        elif isinstance(each, ast.Import | ast.ImportFrom):
            modules = [getattr(each, "module", None) or "", *(alias.name for alias in each.names)]
            names = [part for module in modules for part in module.split(".")]
        elif isinstance(each, ast.Subscript):  # vars(x)["_name"]
            names = [getattr(each.slice, "value", None)]
        elif isinstance(each, ast.Call) and function_name(each) in ASKING:  # getattr(x, "_name")
            names = [getattr(argument, "value", None) for argument in each.args]
        for name in filter(is_private, names):
            found.setdefault(str(name), []).append(each)
    return found


def foreign_uses(path: Path, own: set[str], foreign: set[str]) -> list[str]:
    """What a module uses of private names that are not its own, as sentences.

    Args:
        own: what the classes of the package define.
        foreign: what `internals/` uses.
    """
    module = tree(path)
    here, inherited = defined(module), own | TRAINER_METHODS.keys() | TRAINER_ATTRIBUTES | METRIC_NAMES
    found = []
    for name, nodes in names_used(module).items():
        for node in nodes:
            if isinstance(node, ast.FunctionDef) or name in DOCUMENTED:
                continue
            holder = node.args[0] if isinstance(node, ast.Call) else getattr(node, "value", node)
            if name not in (inherited if is_own(holder) else here - (foreign - METRIC_NAMES)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} uses {name}")
    return found


def test_private_names_of_other_libraries_stand_in_internals_alone():
    own = set().union(*(defined(tree(path)) for path in package()))
    foreign = set().union(*(names_used(tree(path)) for path in ROOT.glob("hf_recycle/internals/*.py")))
    found = [use for path in package() for use in foreign_uses(path, own, foreign)]
    assert not found, "put each into a function of hf_recycle/internals/, or use a public name: " + "; ".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "tensor._version",
        "self._no_split_modules",
        "getattr(model, '_hp_mapping', None)",
        "import torch._dynamo",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from datasets.arrow_dataset import _concatenate_map_style_datasets",
        "module._modules",
        "vars(module)['_buffers']",
        "super()._load_callback_state()",
    ],
)
def test_a_private_name_elsewhere_is_found(tmp_path, monkeypatch, line):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(f"class A:\n    def f(self):\n        self._modules = self._own = 1\n        {line}\n")
    found = foreign_uses(path, {"_modules", "_own"}, {"_modules", "_version", "_hp_mapping"})
    assert len(found) == 1
    assert found[0].startswith("module.py:4 uses _")
