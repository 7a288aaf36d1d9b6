"""The recorder: what goes in comes out, cheaply, whatever the values."""

import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recycle.records.recorder import (
    ACTIVITY_METRICS,
    HISTOGRAM_BINS,
    HISTORY_SCHEMA,
    QUANTILE_LEVELS,
    BlockRecord,
    HistoryRecorder,
    metric_values,
)

STEPS = st.integers(0, 2**40)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
PHASES = st.tuples(
    st.just("phase"),
    STEPS,
    st.integers(1, 2**31 - 1),
    TEXTS,
    st.lists(st.integers(0, 2**31 - 1), max_size=5),
    TEXTS,
)
MAGNITUDES = st.tuples(st.just("magnitude"), STEPS, TEXTS, st.lists(st.floats(width=32, min_value=0), max_size=20))
LOGS = st.tuples(st.just("log"), STEPS, st.dictionaries(TEXTS, st.floats(allow_nan=False), min_size=1, max_size=3))
ACTIVITIES = st.tuples(st.just("activity"), STEPS, TEXTS, st.lists(st.integers(0, 2**31), min_size=3, max_size=3))
ACTIONS = st.lists(PHASES | MAGNITUDES | LOGS | ACTIVITIES, max_size=12)


def play(recorder, actions):
    for kind, step, *rest in actions:
        if kind == "phase":
            phase, block, recycled, note = rest
            recorder.phase(BlockRecord(step, block, len(recycled), len(recycled), recycled, note, phase=phase))
        elif kind == "magnitude":
            recorder.magnitudes(step, rest[0], torch.tensor(rest[1], dtype=torch.float32))
        elif kind == "activity":
            recorder.activity(step, rest[0], dict(zip(ACTIVITY_METRICS, rest[1], strict=True)))
        else:
            recorder.log(step, rest[0])
    return recorder


@settings(max_examples=60, deadline=None)
@given(ACTIONS, ACTIONS)
def test_a_recorder_goes_on_from_its_table(before, after):
    once = play(HistoryRecorder(), before + after)
    again = play(HistoryRecorder.from_table(play(HistoryRecorder(), before).to_table()), after)
    assert once.idle_shares() == again.idle_shares()
    whole, resumed = once.to_table(), again.to_table()
    assert whole.schema.equals(HISTORY_SCHEMA)
    assert whole.to_pylist() == resumed.to_pylist()
    assert whole["kind"].to_pylist() == [action[0] for action in before + after]
    assert whole["step"].to_pylist() == [action[1] for action in before + after]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), max_size=200))
def test_magnitudes_of_any_floats(values):
    recorder = HistoryRecorder()
    recorder.magnitudes(3, "ff", torch.tensor(values, dtype=torch.float32))
    (row,) = recorder.to_table().to_pylist()
    finite = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    assert sum(row["histogram"]) == len(finite)
    lost = len(values) - len(finite)
    assert row["note"] == (f"{lost} of {len(values)} magnitudes are not finite" if lost else "")
    if len(finite):
        expected = np.quantile(finite, QUANTILE_LEVELS).astype(np.float32)
        np.testing.assert_array_equal(np.float32(row["quantiles"]), expected)
        assert len(row["histogram"]) == HISTOGRAM_BINS
        assert len(row["edges"]) == HISTOGRAM_BINS + 1
        assert np.all(np.diff(row["edges"]) > 0)
        assert row["edges"][0] <= finite.min()
        assert row["edges"][-1] >= finite.max()
    else:
        assert row["quantiles"] == row["histogram"] == row["edges"] == []


def test_a_histogram_counts_each_neuron_in_its_bin():
    recorder = HistoryRecorder()
    values = torch.arange(128, dtype=torch.float32)
    recorder.magnitudes(1, "ff", values)
    (row,) = recorder.to_table().to_pylist()
    assert row["histogram"] == [2] * 64
    assert row["edges"] == pytest.approx(np.linspace(0, 127, 65))


def test_magnitudes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"block ff have shape \(2, 3\)"):
        HistoryRecorder().magnitudes(1, "ff", torch.zeros(2, 3))


def test_logs_keep_numbers_only():
    recorder = HistoryRecorder()
    recorder.log(5, {"loss": 1.5, "epoch": 2, "half": np.float32(0.5), "name": "x", "flag": True, "none": None})
    recorder.log(6, {"name": "only text"})
    recorder.log(7, {"loss": float("nan")})
    values = metric_values(recorder.to_table())
    assert {name: steps.tolist() for name, (steps, _) in values.items()} == {
        "loss": [5, 7],
        "epoch": [5],
        "half": [5],
    }
    assert values["loss"][1][0] == 1.5
    assert np.isnan(values["loss"][1][1])
    assert len(recorder.to_table()) == 2


def test_a_long_note_is_shortened():
    recorder = HistoryRecorder()
    recorder.phase(BlockRecord(1, "ff", 1, 1, [0], "x" * 10_000, phase=1))
    assert recorder.to_table()["note"].to_pylist() == ["x" * 500]


def test_another_table_is_refused():
    with pytest.raises(ValueError, match="columns"):
        HistoryRecorder.from_table(pa.table({"step": [1]}))


def test_many_checkpoints_of_a_long_run_stay_cheap():
    recorder = HistoryRecorder()
    for step in range(100_000):
        recorder.log(step, {"loss": 1.0, "learning_rate": 1e-3})
    recorder.to_table()
    start = time.perf_counter()
    for step in range(100):
        recorder.log(100_000 + step, {"loss": 1.0})
        table = recorder.to_table()
    # Building all rows anew at each checkpoint would take 100 times 0.2 s.
    assert time.perf_counter() - start < 4
    assert len(table) == 100_100
    assert table["kind"].num_chunks < 100
