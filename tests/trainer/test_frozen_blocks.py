"""Blocks that are frozen, from the start or for a while: no method touches them, and the history says so."""

import pytest
import torch
from support.tiny_runs import masked_sentences, tiny_bert
from transformers import TrainerCallback

from hf_recycle import RecyclingTrainer

NAMES = [f"bert.encoder.layer.{index}" for index in range(2)]
METHODS = {
    "recycling": {"recycle_steps": 2, "recycle_fraction": 0.25},
    "global": {"recycle_steps": 2, "recycle_fraction": 0.25, "recycle_scope": "global"},
    "fading in": {"recycle_steps": 2, "recycle_fraction": 0.25, "recycle_smooth_steps": 2},
    "midpoint": {"midpoint_weight": 1.0},
    "pruning": {"prune_fraction": 0.5, "prune_steps": 2},
    "overtraining": {"overtrain_steps": 2, "overtrain_batches": 1},
}


class Unfreezing(TrainerCallback):
    """Freezes block 0 for the steps 1 to 4, and looks at its weights after each step, when all methods have acted."""

    def __init__(self):
        self.weights = []

    def layer(self, model):
        return model.bert.encoder.layer[0]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.layer(model).requires_grad_(False)
        self.weights.append(self.look(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(self.look(model))
        if state.global_step == 4:
            self.layer(model).requires_grad_(True)

    def look(self, model):
        return [parameter.detach().clone() for parameter in self.layer(model).parameters()]


def rows(trainer, kind):
    return [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == kind]


def train(arguments, **settings):
    trainer = RecyclingTrainer(
        model=tiny_bert(0.0), args=arguments(max_steps=8, **settings), train_dataset=masked_sentences()
    )
    trainer.add_callback(spy := Unfreezing())
    trainer.train()
    return trainer, spy.weights


@pytest.mark.parametrize("method", METHODS)
def test_gradual_unfreezing(arguments, method):
    trainer, weights = train(arguments, **METHODS[method])
    for step in range(1, 5):
        assert all(map(torch.equal, weights[0], weights[step]))
    for step in range(5, 9):
        assert not all(map(torch.equal, weights[0], weights[step]))
    if method in ("recycling", "fading in"):
        found = [
            (row["step"], row["block"], len(row["recycled"]) > 0, row["note"] or "") for row in rows(trainer, "phase")
        ]
        assert [(step, block) for step, block, recycled, _ in found if recycled] == [
            (2, NAMES[1]),
            (4, NAMES[1]),
            (6, NAMES[0]),
            (6, NAMES[1]),
        ]
        frozen = [(step, block, note) for step, block, _, note in found if "frozen" in note]
        assert frozen == [(step, NAMES[0], "the weights of some blocks are frozen") for step in (2, 4)]
    if method == "pruning":
        noted = [(row["step"], row["block"]) for row in rows(trainer, "pruning") if "frozen" in (row["note"] or "")]
        assert {block for _, block in noted} == {NAMES[0]}
        assert {step for step, _ in noted} >= {2, 4}
        assert [int(mask.sum()) for mask in trainer.neuron_table().pruned.values()] == [16, 16]  # it has caught up
    if method == "midpoint":
        name = "recycling/midpoint_blocks_left_out"
        logged = [row.get(name, 0) for row in trainer.state.log_history if "loss" in row]
        assert logged == [1] * 4 + [0] * 4


def test_what_the_midpoint_loss_leaves_out_is_said_once(arguments, said):
    """Also where a block is frozen in every other step."""

    class Alternating(Unfreezing):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.layer(model).requires_grad_(state.global_step % 2 == 0)

    RecyclingTrainer(
        model=tiny_bert(0.0),
        args=arguments(max_steps=8, midpoint_weight=1.0),
        train_dataset=masked_sentences(),
        callbacks=[Alternating()],
    ).train()
    assert len({text for text in said() if NAMES[0] in text and "midpoint" in text}) == 1


def test_neurons_of_a_block_that_is_frozen_do_not_fade_in_meanwhile(arguments):
    class Freeze(Unfreezing):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            pass

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights.append(self.look(model))
            self.layer(model).requires_grad_(state.global_step not in (3, 4))

    settings = {"recycle_steps": 2, "recycle_end": 2, "recycle_fraction": 0.25, "recycle_smooth_steps": 3}
    trainer = RecyclingTrainer(
        model=tiny_bert(0.0), args=arguments(max_steps=8, **settings), train_dataset=masked_sentences()
    )
    trainer.add_callback(spy := Freeze())
    trainer.train()
    changed = [not all(map(torch.equal, *pair)) for pair in zip(spy.weights, spy.weights[1:], strict=False)]
    assert changed == [True, True, False, False, True, True, True]  # after steps 2 to 8
    assert trainer.neuron_table().fading_in == 0


def test_a_phase_that_finds_all_blocks_frozen_is_skipped(arguments):
    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for layer in model.bert.encoder.layer:
                layer.requires_grad_(state.global_step != 1)

    trainer = RecyclingTrainer(
        model=tiny_bert(0.0),
        args=arguments(max_steps=6, **METHODS["recycling"]),
        train_dataset=masked_sentences(),
        callbacks=[Freeze()],
    )
    trainer.train()
    notes = {row["step"]: row["note"] for row in rows(trainer, "phase")}
    assert notes[2].startswith("skipped: ")
    assert not notes[4]
    assert trainer.neuron_table().phases == 1


def test_blocks_that_are_never_trained_are_left_out_and_a_model_without_others_is_refused(arguments):
    def trainer(frozen):
        model = tiny_bert(0.0)
        for index in frozen:
            model.bert.encoder.layer[index].requires_grad_(False)
        args = arguments(max_steps=6, **METHODS["recycling"])
        return RecyclingTrainer(model=model, args=args, train_dataset=masked_sentences())

    some = trainer([0])
    some.train()
    counts = [int(counts.sum()) for counts in some.neuron_table().counts.values()]
    assert counts[0] == 0 < counts[1]
    with pytest.raises(ValueError, match=r"recycle_steps=2 has nothing to recycle: .*layer\.0' and of all others are"):
        trainer([0, 1]).train()
