"""What is refused before training because the processes are not those that were asked for."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from accelerate.utils import DistributedType
from support.tiny_runs import tiny_bert
from transformers import TrainingArguments

from hf_recycle.engines.checks import check_engine, leave_embeddings_ungrouped
from hf_recycle.engines.launch import check_process_count, check_same, shared_arguments
from hf_recycle.errors import UserError

LAUNCHERS = [
    "HF_RECYCLE_NUM_PROCESSES",
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "RANK",
    "MASTER_ADDR",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", LAUNCHERS[:4])
def test_one_process_where_two_were_asked_for(name, monkeypatch):
    check_process_count(1)
    monkeypatch.setenv(name, "2")
    check_process_count(2)
    with pytest.raises(UserError, match="2 processes were asked for, but each would train alone"):
        check_process_count(1)


def test_the_single_process_launcher_of_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    check_process_count(1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="accelerate launch started a single one"):
        check_process_count(1)
    # A cluster that sets the address of every job also gives it a rank.
    monkeypatch.setenv("RANK", "0")
    check_process_count(1)


def trainer_with(engine: DistributedType, **arguments):
    state = SimpleNamespace(fsdp_plugin=None)
    accelerator = SimpleNamespace(num_processes=2, distributed_type=engine, state=state)
    args = SimpleNamespace(**{"fsdp": None, "deepspeed": None} | arguments)
    return SimpleNamespace(accelerator=accelerator, args=args, is_deepspeed_enabled=False)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("FSDP", "MULTI_CPU", r"FSDP was asked for, but Accelerate would silently train with plain data parallelism"),
        ("FSDP", "NO", "FSDP was asked for, but Accelerate would silently train on one process"),
        ("DEEPSPEED", "MULTI_CPU", r"DeepSpeed was asked for, .* plain data parallelism"),
    ],
)
def test_an_engine_that_silently_became_another(name, found, message, monkeypatch):
    found = DistributedType[found]
    check_engine(trainer_with(found))
    with pytest.raises(UserError, match=message):
        check_engine(trainer_with(found, **{name.lower(): True}))
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=message):
        check_engine(trainer_with(found))
    check_engine(trainer_with(DistributedType[name]))


@pytest.fixture
def other_process(monkeypatch):
    """`other_process(values)`: there is a second process that has `values`; an exchange is simulated."""

    def have(values):
        exchanged = []

        def all_gather_object(everyone, mine):
            if not exchanged:
                exchanged.append(mine)
            everyone[:] = [mine, exchanged[0]]

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
        check_same(values)

    return have


def test_the_first_value_that_differs_is_named(other_process):
    other_process({"seed": 1, "max_steps": 20, "learning_rate": 0.1, "names": {"a", "b"}})
    check_same({"seed": 1, "max_steps": 20, "learning_rate": 0.1, "names": {"b", "a"}})
    with pytest.raises(UserError, match="disagree about max_steps: process 0 has 10, process 1 has 20;"):
        check_same({"seed": 1, "max_steps": 10, "learning_rate": 0.2, "names": {"a", "b"}})
    with pytest.raises(UserError, match="disagree about names: process 0 has nothing, process 1 has "):
        check_same({"seed": 1, "max_steps": 20, "learning_rate": 0.1})


def test_values_without_a_text_of_their_own_are_compared_by_type(other_process):
    other_process({"value": object()})
    check_same({"value": object()})


def test_one_process_has_nothing_to_compare():
    check_same({"seed": 1})


def test_what_processes_may_have_for_themselves(tmp_path):
    def arguments(**values):
        return shared_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values))

    same = arguments()
    assert arguments(disable_tqdm=True, log_level="error", hub_token="secret", run_name="x") == same
    assert "secret" not in str(arguments(hub_token="secret"))
    for name, value in {"seed": 1, "learning_rate": 0.1, "max_steps": 3, "per_device_train_batch_size": 3}.items():
        assert arguments(**{name: value}) != same, name
    assert "output_dir" in same
    assert "output_dir" not in arguments(save_on_each_node=True)


def test_no_group_of_layers_holds_the_input_embeddings(family):
    model = family.build()
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    leave_embeddings_ungrouped(plugin, model)
    names = plugin.transformer_cls_names_to_wrap
    if not getattr(model, "_no_split_modules", None):
        assert names is None
        return
    grouped = [module for module in model.modules() if type(module).__name__ in names]
    assert {type(module).__name__ for module in grouped} == set(names) <= set(model._no_split_modules)
    # The feed-forward blocks at least are in groups, and no embedding is.
    assert grouped
    assert not any(module is model.get_input_embeddings() for layer in grouped for module in layer.modules())


def test_classes_that_the_user_names_stay():
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=["BertEmbeddings"])
    leave_embeddings_ungrouped(plugin, tiny_bert())
    assert plugin.transformer_cls_names_to_wrap == ["BertEmbeddings"]
