"""The rule of `analyze --ceiling` on made-up numbers."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.analysis.verdict import IN_USE, RECYCLE, SPARE, Cost, judge
from hf_recycle.methods.activity import DORMANT, WORTH_RECYCLING
from hf_recycle.methods.presets import preset_values


@pytest.mark.parametrize(
    ("dead", "dormant", "cost", "sd", "name"),
    [
        (0, 0, 0.002, 0.001, SPARE),
        (0, 0, 0.0029, 0.001, SPARE),
        (0, 0, 0.003, 0.001, IN_USE),
        (0, 0, 0.5, 0.01, IN_USE),
        (0, 0, -0.1, 0.0, SPARE),
        (0, 199, 0.5, 0.01, IN_USE),
        (0, 200, 0.5, 0.01, RECYCLE),
        (150, 200, 0.5, 0.01, RECYCLE),
        (500, 500, 0.0, 0.01, RECYCLE),
        (30, 40, 0.0, 0.01, SPARE),
    ],
)
def test_the_rule(dead, dormant, cost, sd, name):
    verdict = judge(1000, dead, dormant, Cost(cost, sd))
    assert verdict.name == name
    first, preset = verdict.sentences
    assert f"{dormant:,} of 1,000 neurons ({dormant / 10:.1f}%) are dead or dormant, {dead} of them dead" in first
    assert first.startswith("Recycle" if name == RECYCLE else "Nothing to recycle here")
    assert ("would recycle them, at most 20% of a layer" in preset) == (name == RECYCLE)
    assert ("leave this model alone" in preset) == (name != RECYCLE)


def test_the_rule_is_that_of_the_preset():
    preset = preset_values("recommended")
    assert (preset["recycle_threshold"], preset["recycle_min_share"]) == (DORMANT, WORTH_RECYCLING)
    assert preset["recycle_selection"] == "dormant"


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-1, 1)), min_size=2, max_size=9), st.integers(1, 50))
def test_batches_of_one_size_give_the_textbook_standard_error(losses, size):
    before = [loss * size for loss, _ in losses]
    after = [(loss + change) * size for loss, change in losses]
    cost = Cost.paired(before, after, [size] * len(losses))
    changes = [change for _, change in losses]
    assert cost.mean == pytest.approx(statistics.mean(changes), abs=1e-9)
    assert cost.sd == pytest.approx(statistics.stdev(changes) / len(changes) ** 0.5, abs=1e-9)


def test_a_larger_batch_counts_for_more():
    """The mean is over tokens; a change that is the same for every token has no noise."""
    assert Cost.paired([1.0, 9.0], [2.0, 9.0], [1, 3]).mean == pytest.approx(0.25)
    even = Cost.paired([1.0, 9.0], [1.5, 10.5], [1, 3])
    assert (even.mean, even.sd) == (pytest.approx(0.5), pytest.approx(0.0))
