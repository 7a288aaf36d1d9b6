"""The course of pruning: exact shares, whatever the steps between prunings."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.methods.pruning import PruningSchedule


def test_the_published_course():
    """20% at 24k for 10k → 80k, of 2,048 neurons."""
    schedule = PruningSchedule(every=100, start=10_000, end=80_000, fraction=1.0)
    assert schedule.target(10_000, 2048) == 0
    assert schedule.target(24_000, 1000) == 200
    assert schedule.target(24_000, 2048) == 409
    assert schedule.target(80_000, 2048) == 2048
    assert not schedule.is_due(9_900)
    assert schedule.is_due(24_000)
    assert not schedule.is_due(24_050)
    assert not schedule.is_due(80_100)


def test_cubic_is_zhu_and_guptas():
    schedule = PruningSchedule(every=1, start=100, end=200, fraction=0.8, shape="cubic")
    for step in (100, 125, 150, 190, 200):
        share = 0.8 + (0 - 0.8) * (1 - (step - 100) / 100) ** 3
        assert schedule.target(step, 100_000) == pytest.approx(share * 100_000, abs=1)


@given(
    st.integers(1, 50),
    st.integers(0, 200),
    st.integers(0, 300),
    st.sampled_from(["0.1", "0.3", "0.7", "1", "0.001"]),
    st.sampled_from(["linear", "cubic"]),
    st.integers(1, 5000),
)
def test_grows_from_nothing_to_the_exact_share(every, start, length, fraction, shape, neurons):
    schedule = PruningSchedule(every, start, start + length, float(fraction), shape)
    due = [step for step in range(start + length + 60) if schedule.is_due(step)]
    assert due == sorted({*range(start, start + length + 1, every), start + length})
    targets = [schedule.target(step, neurons) for step in due]
    assert targets == sorted(targets)
    assert targets[0] == (0 if length else math.floor(Fraction(fraction) * neurons))
    assert targets[-1] == math.floor(Fraction(fraction) * neurons)
    if shape == "linear" and length:
        # In whole numbers, without any floating point.
        assert targets == [math.floor(Fraction(fraction) * (step - start) * neurons / length) for step in due]
