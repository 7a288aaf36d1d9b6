"""Callbacks that the user makes: wired like the trainer's own, however they came to the trainer."""

from pathlib import Path

import pytest
from tiny_runs import assert_same_weights, masked_sentences, tiny_bert
from torch import nn
from transformers import TrainerCallback

from hf_recycle import (
    MagnitudeCallback,
    MidpointLossCallback,
    PruningCallback,
    RecyclingCallback,
    RecyclingHistory,
    RecyclingTrainer,
)
from hf_recycle.neurons.storage.plain import PlainStorage

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}


class Ours(RecyclingCallback):
    """A subclass."""


def trainer_with(arguments, callbacks=(), model=None, **settings):
    args = arguments(**SAVING | settings)
    model = tiny_bert(0.0) if model is None else model
    return RecyclingTrainer(model=model, args=args, train_dataset=masked_sentences(), callbacks=list(callbacks))


def own():
    return [RecyclingCallback(steps=3, fraction=0.1, selection="random"), PruningCallback(fraction=0.2, steps=2)]


def happened(trainer):
    return [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] in ("phase", "pruning")]


def test_a_run_with_ones_own_callbacks_resumes(arguments):
    whole = trainer_with(arguments, own())
    whole.train()
    resumed = trainer_with(arguments, own())
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-4")))
    assert_same_weights(whole, resumed)
    assert happened(whole) == happened(resumed) != []


@pytest.mark.parametrize("kind", [RecyclingCallback, Ours])
def test_a_callback_that_is_added_later_is_wired_too(arguments, kind):
    first = trainer_with(arguments, [kind(steps=3, fraction=0.1, smooth_steps=2)])
    first.train()
    later = trainer_with(arguments)
    later.add_callback(kind(steps=3, fraction=0.1, smooth_steps=2))
    later.train()
    assert type(later.recycling) is kind
    assert_same_weights(first, later)
    history = RecyclingHistory.from_pretrained(Path(later.args.output_dir, "checkpoint-8"))
    assert history.events["step"].tolist() == [3, 3, 6, 6]


def test_methods_act_in_their_order_however_they_came(arguments):
    class Mine(TrainerCallback):
        pass

    trainer = trainer_with(
        arguments,
        [Mine(), MagnitudeCallback(steps=3), RecyclingCallback(steps=3)],
        midpoint_weight=1.0,
    )
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    ours = [kind for kind in kinds if kind in (MidpointLossCallback, RecyclingCallback, MagnitudeCallback)]
    assert ours == [MidpointLossCallback, RecyclingCallback, MagnitudeCallback]
    # Others stay where they were.
    assert kinds.index(Mine) < kinds.index(MidpointLossCallback)


class Odd(nn.Module):
    """Layers that no rule would take for a feed-forward block."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert(0.0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_the_pattern_of_a_callback_is_used(arguments):
    callback = RecyclingCallback(steps=3, ff_pattern="first -> second")
    trainer = trainer_with(arguments, [callback], model=Odd(), masked_head=False)
    assert [block.num_neurons for block in trainer.neuron_table().blocks] == [24]
    # Another pattern for the same model finds other blocks.
    other = trainer_with(
        arguments, model=trainer.model, ff_pattern="intermediate.dense -> output.dense", masked_head=False
    )
    assert [block.num_neurons for block in other.neuron_table().blocks] == [32, 32]


def test_frozen_blocks_are_not_recycled(arguments):
    model = tiny_bert(0.0)
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"recycle_steps=3 would overwrite the frozen weights of block '.*layer\.0'"):
        trainer_with(arguments, model=model, recycle_steps=3).train()
    trainer = trainer_with(arguments, model=model, recycle_steps=3, recycle_layers=(1,), recycle_fraction=0.1)
    trainer.train()
    counts = [int(counts.sum()) for counts in trainer.neuron_table().counts.values()]
    assert counts[0] == 0 < counts[1]


def test_layers_may_be_a_tuple_and_infinity_an_argument(arguments):
    """Both were found out when the first checkpoint was written."""
    settings = {"recycle_steps": 3, "recycle_layers": (0, 1), "max_grad_norm": float("inf")}
    whole = trainer_with(arguments, **settings)
    whole.train()
    folder = Path(whole.args.output_dir, "checkpoint-4")
    assert RecyclingHistory.from_pretrained(folder).config["arguments"]["recycle_layers"] == [0, 1]
    assert RecyclingHistory.from_pretrained(folder).config["run"]["arguments"]["max_grad_norm"] == "inf"
    resumed = trainer_with(arguments, **settings)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same_weights(whole, resumed)


def test_no_smooth_steps_may_be_none(arguments):
    trainer = trainer_with(arguments, recycle_steps=3, recycle_smooth_steps=None)
    trainer.train()
    assert trainer.recycling.smooth_steps == 0


@pytest.mark.parametrize("reinit", ["matched_normal", "copy_noise"])
def test_looking_at_weights_that_fade_in_is_refused_under_deepspeed(arguments, reinit, monkeypatch):
    """There the masters hold the new weights all the time."""
    monkeypatch.setattr(PlainStorage, "separate_masters", True)
    settings = {"recycle_steps": 3, "recycle_smooth_steps": 4, "recycle_reinit": reinit}
    with pytest.raises(ValueError, match=f"recycle_reinit='{reinit}' can't be used under DeepSpeed with"):
        trainer_with(arguments, **settings).train()
