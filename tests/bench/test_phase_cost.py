"""The measurement of phases: that it measures phases. How long they take is no matter of a test."""

import pytest
import torch

from benchmarks import phase_cost as measured
from benchmarks.phase_cost import SHAPES, Shape, Timing, phase_cost, phase_cost_table
from hf_recycle.methods.recycling import phase

TINY = Shape(8, 20, 3)


def test_shapes():
    assert SHAPES["BERT Medium"].weights == 8 * 2 * 512 * 2048
    assert SHAPES["BERT Large"].training_bytes == pytest.approx(2.4e9, rel=0.01)


def test_the_phases_that_are_measured_recycle(monkeypatch):
    """Every one of them takes the neurons that its fraction asks for, in every block, and half of them reset state."""
    records, resets = [], []

    def spy(table, settings, *args, **kwargs):
        optimizer = kwargs["optimizer"]
        before = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
        records.append(phase.run_phase(table, settings, *args, **kwargs))
        # All entries are alike at first, and a reset gives their mean: to be told by the first moments.
        resets.append((settings.optimizer_state, [bool((s["exp_avg"] == 0).any()) for s in optimizer.state.values()]))
        assert all(a.shape == b["exp_avg_sq"].shape for a, b in zip(before, optimizer.state.values(), strict=True))

    monkeypatch.setattr(measured, "run_phase", spy)
    threads = torch.get_num_threads()
    cost = phase_cost(TINY, repetitions=2, fraction=0.1)
    assert torch.get_num_threads() == threads
    assert [len(block.chosen) for blocks in records for block in blocks] == [2] * TINY.layers * len(records)
    assert [mode for mode, _ in resets] == ["keep", "reset"] * 3
    assert not any(resets[0][1])
    per_block = [True, True, True, False]  # of b_out no entry belongs to a neuron
    assert resets[1][1] == per_block * TINY.layers
    assert (cost.shape, cost.fraction, cost.repetitions) == (TINY, 0.1, 2)


def test_timings_are_medians_of_rounds_taken_in_turn(monkeypatch):
    calls, clock = [], iter(range(0, 1000))
    monkeypatch.setattr(measured.time, "process_time", lambda: next(clock) ** 2)
    operations = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = measured._interleaved(operations, 3)
    assert calls == list("abababab")
    # a: from 0 to 1, 16 to 25, 64 to 81, 144 to 169; the first is not counted.
    assert found["a"] == Timing(median=17, low=13, high=21)


def test_the_table():
    one = Timing(0.001, 0.001, 0.001)
    three = Timing(0.003, 0.002, 0.004)
    cost = measured.PhaseCost(TINY, 0.01, 5, read=one, magnitudes=one, phase_keep=three, phase_reset=three)
    row = phase_cost_table({"tiny": cost}).splitlines()[-1]
    assert row.startswith("| tiny: 3 × 8 × 20 | 0.0 M | 1.00 ms (1.00–1.00) | 1.0× (1.0 ms) | 3.0× (3.0 ms) |")
