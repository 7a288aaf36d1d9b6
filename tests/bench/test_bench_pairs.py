"""Intervals of medians, and verdicts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pairs import Estimate, estimate, spread
from benchmarks.row import MET, MISSED, NOISY, Target


@pytest.mark.parametrize("n", [*range(1, 41), 60])
def test_the_interval_is_the_narrowest_that_holds_the_median_often_enough(n):
    found = estimate(range(n))
    left_out = int(found.low)

    def coverage(dropped):
        """Chance that the median of a continuous distribution lies between the order statistics that stay."""
        return sum(math.comb(n, below) for below in range(dropped + 1, n - dropped)) / 2**n

    assert found.high == n - 1 - left_out
    if n >= 6:
        assert coverage(left_out) >= 0.95 > coverage(left_out + 1)
    else:
        assert left_out == 0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.randoms())
def test_the_order_of_pairs_does_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    found = estimate(shuffled)
    assert found == estimate(values)
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(np.median(values))


def test_spread_is_relative():
    assert spread([9.0, 10.0, 11.0]) == pytest.approx(0.2)
    assert spread([90.0, 100.0, 110.0]) == pytest.approx(0.2)


@given(st.floats(0.1, 3), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_verdict_needs_the_whole_interval(bound, below, above, at_least):
    measured = Estimate(bound, bound - below, bound + above, 9)
    ends = [end >= bound if at_least else end <= bound for end in (measured.low, measured.high)]
    expected = MET if all(ends) else NOISY if any(ends) else MISSED
    assert Target(bound, at_least).verdict(measured) == expected


@pytest.mark.parametrize(
    ("target", "low", "high", "verdict"),
    [
        (Target(1.6, True), 1.61, 1.9, MET),
        (Target(1.6, True), 1.2, 1.59, MISSED),
        (Target(1.6, True), 1.5, 1.7, NOISY),
        (Target(0.02, False, "cost"), -0.01, 0.019, MET),
        (Target(0.02, False, "cost"), 0.021, 0.1, MISSED),
        (Target(0.02, False, "cost"), 0.0, 0.1, NOISY),
    ],
)
def test_verdicts(target, low, high, verdict):
    assert target.verdict(Estimate((low + high) / 2, low, high, 9)) == verdict


def test_how_targets_are_written():
    assert str(Target(1.6, True)) == "≥ 1.60×"
    assert str(Target(0.005, False, "cost")) == "≤ +0.50%"
    assert str(Target(0.97, True, "share")) == "≥ 97.0%"
