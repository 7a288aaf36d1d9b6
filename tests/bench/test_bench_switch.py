"""Methods that a bench switches on and off from step to step."""

import pytest
from transformers import TrainerCallback

from benchmarks.contestant import OURS, Contestant, make_trainer
from benchmarks.costs import _AT_EVERY_HUNDREDTH, _AT_EVERY_STEP, _AT_EVERY_THOUSANDTH
from benchmarks.shapes import TINY
from benchmarks.switch import SWITCHES, is_on
from hf_recycle.methods.midpoint import Midpoint
from hf_recycle.neurons.table import NeuronTable

STEPS = 8
ON = [step for step in range(1, STEPS + 1) if is_on(step)]


def test_each_pair_has_one_step_of_either_kind():
    assert [is_on(step) for step in range(1, 9)] == [True, False, False, True, True, False, False, True]


class Switching(TrainerCallback):
    """Switches before each step, as a contestant does, and notes after each what `look` sees."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(self.look(model))
        self.switch(is_on(state.global_step + 1))


def train(method, folder, look=lambda model: None):
    arguments = {**_AT_EVERY_STEP, **_AT_EVERY_HUNDREDTH, **_AT_EVERY_THOUSANDTH}[method]
    trainer = make_trainer(Contestant(method, OURS, TINY, arguments, method), STEPS, str(folder))
    switching = Switching(look)
    trainer.add_callback(switching)
    switching.switch = SWITCHES[method](trainer)
    trainer.train()
    return trainer, switching.seen


def steps_of(trainer, kind):
    return sorted({row["step"] for row in trainer.recorder.to_table().to_pylist() if row["kind"] == kind})


def age(model):
    return int(NeuronTable.of(model).states[0].fade_in.age[0])


@pytest.mark.parametrize("method", ["recycling", *_AT_EVERY_THOUSANDTH])
def test_recycling_happens_at_the_steps_it_is_on(method, tmp_path):
    trainer, _ = train(method, tmp_path)
    # Never at the last step: what is recycled then is not trained.
    assert steps_of(trainer, "phase") == [s for s in ON if s < STEPS]


def test_histograms_are_made_at_the_steps_they_are_on(tmp_path):
    trainer, _ = train("magnitudes", tmp_path)
    assert steps_of(trainer, "magnitude") == [0, *ON]


def test_transitions_go_on_at_the_steps_they_are_on(tmp_path):
    _, ages = train("smooth", tmp_path, age)
    # They begin at the end of the first step.
    assert ages == [sum(2 <= on <= step for on in ON) for step in range(1, STEPS + 1)]


def test_the_midpoint_step_is_taken_at_the_steps_it_is_on(tmp_path, monkeypatch):
    seen, taken = [], []
    monkeypatch.setattr(Midpoint, "_take", lambda self, positions, slopes, rate_of: taken.append(len(seen)))
    train("midpoint", tmp_path, lambda model: seen.append(None))
    # Counted are the steps that were over before.
    assert [done + 1 for done in taken] == ON
