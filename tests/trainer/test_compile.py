"""`torch_compile=True`: one graph for the whole training, whatever recycling does, and the same weights."""

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_runs import assert_same_weights, losses, masked_sentences, sentences, tiny_bert
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from transformers import BertForMaskedLM, default_data_collator

pytestmark = pytest.mark.slow

COMPILE = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
SMOOTH = {"recycle_steps": 5, "recycle_fraction": 0.1, "recycle_smooth_steps": 4}
METHODS = {
    "off": {},
    "full head": {"masked_head": False, "deterministic_masking": True},
    "immunity": {
        "recycle_steps": 2,
        "recycle_fraction": 0.2,
        "recycle_immunity": 1,
        "recycle_reinit": "matched_normal",
    },
    "smooth, midpoint, magnitudes": {**SMOOTH, "midpoint_weight": 0.05, "magnitude_steps": 4},
    "overtraining": {"overtrain_steps": 3, "overtrain_batches": 2, "magnitude_steps": 4},
    "evaluation": {**SMOOTH, "eval_strategy": "steps", "eval_steps": 4},
}


@pytest.fixture(autouse=True)
def counting():
    """Counts from zero: `counters["stats"]["unique_graphs"]` and `counters["graph_break"]`."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> tuple[int, int]:
    """Compiled graphs and graph breaks so far."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def assert_close_weights(first, second):
    first, second = first.model.state_dict(), second.model.state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Collator:
    """A user's, on samples that are masked already; some with a wrong idea of how much."""

    def __init__(self, mlm_probability=None):
        if mlm_probability is not None:
            self.mlm_probability = mlm_probability

    def __call__(self, examples):
        return default_data_collator(examples)


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_and_the_same_weights(method, train):
    # An epsilon large enough that Adam does not blow up the rounding of gradients that are zero.
    settings = {**METHODS[method], "adam_epsilon": 1e-3}
    eager = train("eager", model=tiny_bert(0.0), evaluation=sentences(8, seed=4), **settings)
    assert graphs() == (0, 0)
    compiled = train("compiled", model=tiny_bert(0.0), evaluation=sentences(8, seed=4), **settings, **COMPILE)
    assert graphs() == (1, 0)
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-5)
    assert_close_weights(eager, compiled)
    assert compiled.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-5)
    if "recycle_steps" in settings:
        assert compiled.neuron_table().counts["bert.encoder.layer.0"].sum() > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_the_code_that_inductor_makes_gives_the_same_weights(train):
    settings = {**SMOOTH, "midpoint_weight": 0.05, "adam_epsilon": 1e-3}
    eager = train("eager", model=tiny_bert(0.0, layers=1), **settings)
    with inductor.patch(compile_threads=1):  # its pool of processes would import torch for each
        compiled = train("compiled", model=tiny_bert(0.0, layers=1), **settings, torch_compile=True)
    assert graphs() == (1, 0)
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-5)
    assert_close_weights(eager, compiled)


@pytest.mark.parametrize("share", [None, 0.4, 0.01, 7.0])
def test_a_users_collator(share, train):
    """Uneven numbers of masked tokens, of which the trainer knows nothing, or something, or something wrong."""
    settings = {"data": masked_sentences(), "collator": Collator(share), "adam_epsilon": 1e-3}
    eager = train("eager", model=tiny_bert(0.0), **settings)
    compiled = train("compiled", model=tiny_bert(0.0), **settings, **COMPILE)
    assert graphs() == (1, 0)
    assert_close_weights(eager, compiled)


def test_rare_large_batches_cost_one_compilation_and_lose_no_token(train):
    # 12 masked tokens of 48 in most batches, for which 24 positions are computed; up to 48 in others.
    data = [{**row, "labels": [7] * 12 if i % 4 == 0 else [7] * 3 + [-100] * 9} for i, row in enumerate(sentences(48))]
    settings = {"data": data, "collator": Collator(0.25), "adam_epsilon": 1e-3}
    eager = train("eager", model=tiny_bert(0.0), **settings)
    compiled = train("compiled", model=tiny_bert(0.0), **settings, **COMPILE)
    assert graphs() == (2, 0)
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-5)
    assert_close_weights(eager, compiled)


def test_accumulation_is_part_of_the_batch(train):
    whole = train("whole", model=tiny_bert(0.0), per_device_train_batch_size=8, max_steps=6, adam_epsilon=1e-3)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 6}
    parts = train("parts", model=tiny_bert(0.0), adam_epsilon=1e-3, **settings, **COMPILE)
    assert graphs() == (1, 0)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert_close_weights(whole, parts)


def test_resume_in_mid_transition_and_plain_names(train):
    settings = {**SMOOTH, **COMPILE, "save_strategy": "steps", "save_steps": 6}
    whole = train("whole", **settings)
    middle = Path(whole.args.output_dir, "checkpoint-6")
    assert set(load_file(middle / "model.safetensors")) <= set(tiny_bert().state_dict())
    assert load_file(middle / "recycling_state.safetensors")["trainer/phases"] == 1
    _, report = BertForMaskedLM.from_pretrained(middle, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    resumed = train("resumed", resume=str(middle), **settings)
    assert_same_weights(whole, resumed)
    assert losses(resumed)[-6:] == losses(whole)[-6:]
    assert graphs() == (1, 0)  # of both trainers, whose models are built alike


@pytest.mark.parametrize("dispatch", [None, False])
def test_streams(dispatch, train):
    def stream():
        return datasets.Dataset.from_list(sentences(24)).to_iterable_dataset()

    config = {"accelerator_config": {"dispatch_batches": dispatch}, "adam_epsilon": 1e-3}
    eager = train("eager", model=tiny_bert(0.0), data=stream(), **config)
    compiled = train("compiled", model=tiny_bert(0.0), data=stream(), **config, **COMPILE)
    assert graphs() == (1, 0)
    assert_close_weights(eager, compiled)


def test_fused_adamw_in_bf16(train):
    """Autocast rounds in another order when compiled, so the comparison is coarse."""
    settings = {**SMOOTH, "optim": "adamw_torch_fused", "bf16": True, "adam_epsilon": 1e-3}
    eager = train("eager", model=tiny_bert(0.0), **settings)
    compiled = train("compiled", model=tiny_bert(0.0), **settings, **COMPILE)
    assert graphs() == (1, 0)
    assert losses(compiled) == pytest.approx(losses(eager), abs=0.02)
    assert compiled.neuron_table().phases == eager.neuron_table().phases == 2
