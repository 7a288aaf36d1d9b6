"""Profiles of small steps, and how operations are put together."""

import pytest

from benchmarks.shapes import TINY
from benchmarks.step_profile import StepProfile, contestants, profile_step, profile_table, shares


def test_operations_are_put_together():
    found = shares({"aten::mm": 2.0, "mkldnn::_linear_pointwise": 1.0, "aten::copy_": 0.5, "Optimizer.step": 0.5})
    assert sum(found.values()) == pytest.approx(1)
    assert {part: share for part, share in found.items() if share} == {
        "matrix products": 0.75,
        "copies and fills": 0.125,
        "everything else": 0.125,
    }


def test_the_table_compares_with_the_first():
    slow, fast = (StepProfile({"loss": 1.0}, cpu, 0.25, 12_345.4) for cpu in (3.0, 1.5))
    table = profile_table({"stock": slow, "ours": fast}).splitlines()
    assert table[0] == "|  | stock | ours |"
    assert "| loss | 100.0% | 100.0% |" in table
    assert "| CPU time of a step | 3.00 s (1.00×) | 1.50 s (2.00×) |" in table
    assert "| page faults of a step | 12,345 | 12,345 |" in table


@pytest.mark.long
def test_steps_of_a_training():
    for name in ("stock", "ours"):
        profile = profile_step(contestants(TINY)[name], steps=2)
        assert sum(profile.shares.values()) == pytest.approx(1)
        assert all(share > 0 for share in profile.shares.values())
        assert profile.cpu > 0
        assert 0 <= profile.system < 1
