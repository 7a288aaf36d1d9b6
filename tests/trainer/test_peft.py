"""PEFT models: a saved adapter must hold the weights that methods change."""

import pytest
from support.tiny_runs import masked_sentences, tiny_bert

from hf_recycle import RecyclingTrainer, find_feed_forwards
from hf_recycle.methods.saved_weights import check_weights_are_saved
from hf_recycle.neurons.find import survey

# Of peft itself, which the tests' rule on transformers' deprecations is not for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

METHODS = {
    "recycling": {"recycle_steps": 2},
    "midpoint": {"midpoint_weight": 0.1},
    "pruning": {"prune_fraction": 0.5, "prune_steps": 2},
    "overtraining": {"overtrain_steps": 2, "overtrain_batches": 1},
}


def adapted(adapter="default", **config):
    peft = pytest.importorskip("peft", reason="peft is not installed (make test installs it)")
    return peft.get_peft_model(tiny_bert(0.0), peft.LoraConfig(target_modules=["query", "value"], **config), adapter)


def is_feed_forward(name):
    return "intermediate.dense" in name or ("output.dense" in name and "attention" not in name)


def trainer_of(model, arguments, **settings):
    return RecyclingTrainer(model=model, args=arguments(max_steps=4, **settings), train_dataset=masked_sentences())


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_the_adapter_lacks_are_not_changed(arguments, method):
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or is_feed_forward(name))
    with pytest.raises(ValueError, match=r"layer\.0' are trained, but checkpoints of this PEFT model would hold its"):
        trainer_of(model, arguments, **METHODS[method]).train()


def test_frozen_weights_under_an_adapter_are_not_recycled(arguments):
    with pytest.raises(ValueError, match=r"recycle_steps=2 has nothing to recycle: .* are frozen"):
        trainer_of(adapted(), arguments, **METHODS["recycling"]).train()


@pytest.mark.parametrize("name", ["default", "mine"])
def test_weights_that_the_adapter_saves_are_recycled(name, arguments):
    model = adapted(name, modules_to_save=["intermediate.dense", "output.dense"])
    pattern = f"intermediate.dense.modules_to_save.{name} -> output.dense.modules_to_save.{name}"
    trainer = trainer_of(model, arguments, **METHODS["recycling"], recycle_fraction=0.25, ff_pattern=pattern)
    trainer.train()
    assert sum(int(counts.sum()) for counts in trainer.neuron_table().counts.values()) == 2 * 8


@pytest.mark.parametrize("saved", [["intermediate", "output"], ["intermediate.dense", "output.dense"]])
def test_weights_that_the_adapter_saves_are_found(saved):
    found = survey(adapted(modules_to_save=saved))
    assert [block.name for block in found.blocks] == [f"base_model.model.bert.encoder.layer.{i}" for i in (0, 1)]
    assert not any(block.is_frozen for block in found.blocks)
    assert not found.left_out


def test_what_is_sharded_is_looked_at_too():
    """Parameters without an address, as those of FSDP2 are."""
    pattern = "intermediate.dense.modules_to_save.default -> output.dense.modules_to_save.default"
    saved = adapted(modules_to_save=["intermediate.dense", "output.dense"]).to("meta")
    check_weights_are_saved(saved, find_feed_forwards(saved, pattern))
    lacking = adapted().requires_grad_(True).to("meta")
    with pytest.raises(ValueError, match="would hold its adapter without them"):
        check_weights_are_saved(lacking, find_feed_forwards(lacking))
