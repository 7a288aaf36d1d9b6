"""Which steps have a phase and how many neurons each takes, against loops over every step."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.methods.schedule import FRACTION_SCHEDULES, PhaseSchedule, resolve_steps


def phases(schedule: PhaseSchedule) -> list[int]:
    return [step for step in range(schedule.last_step + 10) if schedule.is_phase(step)]


def test_the_articles_seven_phases():
    schedule = PhaseSchedule(every=10_000, start=10_000, end=80_000, last_step=80_000, fraction=0.1)
    assert phases(schedule) == [10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 70_000]
    assert [schedule.quota(step, 2048) for step in phases(schedule)] == [204, 205, 205, 205, 205, 204, 205]


@pytest.mark.parametrize(
    ("every", "start", "end", "last", "expected"),
    [
        (10, 0, 50, 50, [10, 20, 30, 40]),  # not step 0, not the last
        (10, 0, 50, 51, [10, 20, 30, 40, 50]),  # the end belongs to it
        (10, 5, 50, 50, [5, 15, 25, 35, 45]),
        (10, 5, 25, 50, [5, 15, 25]),
        (10, 5, 24, 50, [5, 15]),
        (10, 45, 45, 50, [45]),
        (7, 3, 100, 10, [3]),  # 10 is the last step
        (100, 0, 50, 50, []),
        (1, 0, 4, 4, [1, 2, 3]),
        (10, 60, 70, 50, []),
    ],
)
def test_phases(every, start, end, last, expected):
    schedule = PhaseSchedule(every, start, end, last, 0.1)
    assert phases(schedule) == expected
    for step in range(last + 3):
        assert list(schedule.phases_until(step)) == [t for t in expected if t <= step]


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_the_rule_of_the_specification(every, start, end, last):
    """`start <= t <= end` and `(t - start) % every == 0`, t an optimizer step that is not the last."""
    schedule = PhaseSchedule(every, start, end, last, 0.1)
    expected = [t for t in range(1, last) if start <= t <= end and (t - start) % every == 0]
    assert phases(schedule) == expected
    assert list(schedule.phases_until(last)) == expected


@given(st.integers(1, 9999), st.sampled_from([10, 100, 1000, 10000]), st.integers(1, 5000), st.integers(1, 30))
def test_accumulated_counts_are_exact(digits, power, neurons, count):
    """After p phases ⌊p·k⌋ neurons, with k from the decimal that the user wrote, not from its binary neighbour."""
    fraction = digits / power
    if not 0 < fraction <= 1:
        return
    schedule = PhaseSchedule(5, 5, 10_000, 10_000, fraction)
    total = 0
    for p in range(1, count + 1):
        total += schedule.quota(5 * p, neurons)
        assert total == digits * p * neurons // power


def test_a_thousandth_of_512_is_one_about_every_second_phase():
    schedule = PhaseSchedule(1, 1, 10_000, 10_000, 0.001)
    quotas = [schedule.quota(step, 512) for step in range(1, 41)]
    assert quotas[:6] == [0, 1, 0, 1, 0, 1]
    assert set(quotas) == {0, 1}
    assert sum(quotas) == math.floor(40 * 0.512)


def test_a_tenth_taken_ten_times_is_everything():
    schedule = PhaseSchedule(10, 10, 1000, 1000, 0.1)
    assert sum(schedule.quota(step, 2048) for step in range(10, 110, 10)) == 2048


@pytest.mark.parametrize("decay", FRACTION_SCHEDULES)
def test_decay_accumulates_the_running_sum(decay):
    start, end, fraction, neurons = 100, 900, 0.03, 777
    schedule = PhaseSchedule(50, start, end, 5000, fraction, decay)
    shape = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - (t - start) / (end - start),
        "cosine": lambda t: (1 + math.cos(math.pi * (t - start) / (end - start))) / 2,
    }[decay]
    wanted, taken = 0.0, 0
    for step in range(start, end + 1, 50):
        assert float(schedule.fraction_at(step)) == pytest.approx(fraction * shape(step), abs=1e-12)
        wanted += fraction * shape(step) * neurons
        taken += schedule.quota(step, neurons)
        assert abs(taken - wanted) < 1
        assert taken in {math.floor(wanted - 1e-6), math.floor(wanted + 1e-6)}
    assert schedule.fraction_at(start) == Fraction("0.03")
    if decay != "constant":
        assert schedule.fraction_at(end) == 0
        assert schedule.quota(end, neurons) == 0


@given(
    st.sampled_from(FRACTION_SCHEDULES),
    st.tuples(*[st.integers(1, 30), st.integers(0, 90), st.integers(0, 400), st.integers(1, 400)]),
    st.integers(1, 999),
    st.integers(1, 5000),
    st.randoms(use_true_random=False),
)
def test_quotas_are_those_of_the_sum_over_all_phases(decay, when, thousandths, neurons, random):
    """Asked for in any order: a resumed run begins with a late one."""
    every, start, length, last = when
    schedule = PhaseSchedule(every, start, start + length, last, thousandths / 1000, decay)
    expected, total = {}, Fraction(0)
    for step in phases(schedule):
        share = Fraction(thousandths, 1000)
        progress = Fraction(step - start, max(length, 1))
        if decay == "linear":
            share *= 1 - progress
        elif decay == "cosine":
            share *= Fraction(f"{(1 + math.cos(math.pi * float(progress))) / 2:.12f}")
        expected[step] = math.floor((total + share) * neurons) - math.floor(total * neurons)
        total += share
    order = random.sample(list(expected), len(expected))
    assert {step: schedule.quota(step, neurons) for step in order} == {step: expected[step] for step in order}


@pytest.mark.parametrize("decay", FRACTION_SCHEDULES)
def test_a_late_quota_costs_what_an_early_one_costs(decay, monkeypatch):
    schedule = PhaseSchedule(1, 1, 10**6, 10**6 + 1, 0.01, decay)
    schedule.quota(2000, 512)
    asked = []
    monkeypatch.setattr(math, "cos", lambda angle, cos=math.cos: asked.append(angle) or cos(angle))
    for step in range(2001, 2021):
        schedule.quota(step, 512), schedule.quota(step, 333)
    assert len(asked) <= 20 * 4


@pytest.mark.parametrize("decay", ["constant", "linear"])
def test_trainings_without_end(decay):
    schedule = PhaseSchedule(1, 0, 10**30, 10**30, 0.5, decay)
    assert schedule.quota(10**15, 8) in (3, 4, 5)
    assert len(schedule.phases_until(10**30)) > 10**18


@pytest.mark.parametrize(
    ("value", "total", "expected"),
    [
        (None, 100, None),
        (0, 100, 0),
        (1, 100, 1),
        (1.0, 100, 1),
        (250, 100, 250),
        (0.5, 100, 50),
        (0.5, 101, 51),
        (0.1, 30, 3),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001 in floating point: not 8
        (0.29, 100, 29),
        (0.001, 50, 1),
        (1e-7, 50, 1),
    ],
)
def test_resolve_steps(value, total, expected):
    resolved = resolve_steps(value, total)
    assert resolved == expected
    assert resolved is None or isinstance(resolved, int)
