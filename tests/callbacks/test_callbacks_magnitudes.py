"""`MagnitudeCallback` on a stock Trainer."""

import itertools

import pytest
import torch
from transformers import TrainerCallback

from hf_recycle import MagnitudeCallback, neuron_magnitudes
from hf_recycle.records.recorder import rows_of_kind

BLOCKS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def rows(callback):
    return rows_of_kind(callback.recorder.to_table(), "magnitude").to_pylist()


def test_before_the_first_step_every_few_and_after_the_last(bert, train):
    callback = MagnitudeCallback(steps=8)
    train(bert, [callback])
    assert [(row["step"], row["block"]) for row in rows(callback)] == [
        (step, block) for step in (0, 8, 16, 24, 30) for block in BLOCKS
    ]


def test_the_last_step_is_recorded_once(bert, train):
    callback = MagnitudeCallback(steps=0.5)
    train(bert, [callback])
    assert [row["step"] for row in rows(callback)] == [0, 0, 15, 15, 30, 30]


def test_what_is_recorded_are_the_magnitudes_of_that_step(bert, train):
    seen = {}

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = neuron_magnitudes(model)

    callback = MagnitudeCallback(steps=10)
    start = neuron_magnitudes(bert)
    train(bert, [callback, Spy()])
    for row in rows(callback):
        values = (start if row["step"] == 0 else seen[row["step"]])[row["block"]]
        assert sum(row["histogram"]) == 40
        assert row["edges"][0] == pytest.approx(float(values.min()))
        assert row["edges"][-1] == pytest.approx(float(values.max()))
        edges = torch.tensor(row["edges"], dtype=torch.float64)
        inside = [
            int(((values.double() >= low) & (values.double() < high)).sum()) for low, high in itertools.pairwise(edges)
        ]
        inside[-1] += 1  # the largest lies on the last edge
        assert row["histogram"] == inside


def test_it_changes_no_weight_and_off_it_records_nothing(bert, train):
    callback = MagnitudeCallback()
    reference = train(bert).model
    for each in (callback, MagnitudeCallback(steps=3)):
        model = train(bert, [each]).model
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert rows(callback) == []


def test_bad_settings():
    with pytest.raises(ValueError, match=r"steps=2\.5 is not allowed: it must be an integer number of steps"):
        MagnitudeCallback(steps=2.5)
    with pytest.raises(TypeError, match="every"):
        MagnitudeCallback(every=3)
