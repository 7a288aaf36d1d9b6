"""Callbacks that the user makes: wired like the trainer's own, however they came to the trainer."""

from pathlib import Path

import pytest
from support.tiny_runs import assert_same_weights, masked_sentences, tiny_bert, tiny_t5
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_recycle import (
    MagnitudeCallback,
    PruningCallback,
    RecyclingCallback,
    RecyclingHistory,
    RecyclingTrainer,
)
from hf_recycle.methods.magnitudes import Magnitudes
from hf_recycle.methods.midpoint import Midpoint
from hf_recycle.methods.recycling.callback import Recycling
from hf_recycle.neurons.storage.plain import PlainStorage
from hf_recycle.neurons.table import NeuronTable

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
    later, callback = trainer_with(arguments), kind(steps=3, fraction=0.1, smooth_steps=2)
    later.add_callback(callback)
    later.train()
    assert later.recycling is callback.method
    assert callback.recorder is later.recorder
    assert_same_weights(first, later)
    history = RecyclingHistory.from_pretrained(Path(later.args.output_dir, "checkpoint-8"))
    assert history.events["step"].tolist() == [3, 3, 6, 6]


def test_methods_act_in_their_order_however_they_came(arguments):
    trainer = trainer_with(arguments, [MagnitudeCallback(steps=3), RecyclingCallback(steps=3)], midpoint_weight=1.0)
    assert [type(method) for method in trainer.neuron_methods.methods] == [Midpoint, Recycling, Magnitudes]


def test_a_callback_works_by_itself_again_on_a_stock_trainer(arguments):
    callback = RecyclingCallback(steps=3, fraction=0.1)
    trainer_with(arguments, [callback]).train()
    stock = Trainer(
        model=tiny_bert(0.0),
        args=TrainingArguments(output_dir=arguments().output_dir, max_steps=8, use_cpu=True, save_strategy="no"),
        train_dataset=masked_sentences(),
        callbacks=[callback],
    )
    stock.train()
    assert sum(int(counts.sum()) for counts in NeuronTable.of(stock.model).counts.values()) > 0


def test_a_callback_may_train_elsewhere_before_it_does_here(arguments, tmp_path):
    callback = RecyclingCallback(steps=2, fraction=0.25)
    ours = trainer_with(arguments, [callback])
    plain = TrainingArguments(str(tmp_path / "stock"), max_steps=4, use_cpu=True, report_to="none", save_strategy="no")
    Trainer(tiny_bert(0.0), plain, train_dataset=masked_sentences(), callbacks=[callback]).train()
    assert any(int(counts.sum()) for counts in callback.table.counts.values())
    ours.train()
    assert callback.method is ours.recycling
    assert happened(ours)


class Odd(nn.Module):
    """Layers that no rule would take for a feed-forward block."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert(0.0)
        # In a part of their own: beside the layers of the model they would be taken for embeddings and a head.
        self.part = nn.ModuleDict({"first": nn.Linear(16, 24), "second": nn.Linear(24, 16)})

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


def test_a_part_of_a_composite_model(arguments):
    """On a stock Trainer, and taken over by ours."""
    recycled = []
    for cls in (Trainer, RecyclingTrainer):
        callback = RecyclingCallback(steps=2, fraction=0.25, ff_blocks="decoder")
        args = arguments(max_steps=4, max_grad_norm=0.0)
        trainer = cls(model=tiny_t5(), args=args, train_dataset=masked_sentences(), callbacks=[callback])
        trainer.train()
        assert list(callback.table.counts) == ["decoder.block.0.layer.2.DenseReluDense"]
        recycled.append([(row["block"], row["recycled"]) for row in happened(callback)])
    assert recycled[0] == recycled[1] != []
    assert trainer.recycling_arguments()["ff_blocks"] == "decoder"


def test_parts_that_differ_are_refused(arguments):
    callbacks = [PruningCallback(fraction=0.2, ff_blocks="decoder")]
    with pytest.raises(ValueError, match="ff_blocks is given as 'decoder' and as 'encoder': all methods need the same"):
        trainer_with(arguments, callbacks, model=tiny_t5(), recycle_steps=2, ff_blocks="encoder")
