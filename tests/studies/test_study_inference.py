import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.studies.inference import paired_difference, student_t_quantile


# Published tables of Student's t.
@pytest.mark.parametrize(
    ("p", "df", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 4, 2.77645),
        (0.975, 9, 2.26216),
        (0.975, 30, 2.04227),
        (0.975, 120, 1.97993),
        (0.95, 5, 2.01505),
        (0.995, 7, 3.49948),
        (0.5, 4, 0.0),
    ],
)
def test_quantiles_are_those_of_the_tables(p, df, quantile):
    assert student_t_quantile(p, df) == pytest.approx(quantile, abs=1e-4)


def test_two_degrees_of_freedom_have_a_closed_form():
    for p in (0.6, 0.9, 0.975, 0.999):
        assert student_t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)))


def test_many_degrees_of_freedom_come_near_the_normal_distribution():
    assert student_t_quantile(0.975, 10_000) == pytest.approx(1.960201, abs=1e-5)


def test_an_interval_worked_out_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, so 2 ± 4.30265 / √3.
    found = paired_difference([2, 4, 6], [1, 2, 3])
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.p == 0.25  # all of one sign: 2 of 8
    assert found.seeds == 3


def test_one_seed_has_no_interval():
    found = paired_difference([1.5], [1.0])
    assert (found.mean, found.low, found.high, found.p, found.seeds) == (0.5, None, None, None, 1)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize(("arm", "baseline"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (INF, INF), (NAN, NAN)])
def test_a_run_that_diverged_leaves_no_interval_and_no_p(n, arm, baseline):
    found = paired_difference([arm, *[2.0] * (n - 1)], [baseline, *[1.0] * (n - 1)])
    assert (found.low, found.high, found.p, found.seeds) == (None, None, None, n)
    assert found.diverged
    assert not paired_difference([2.0] * n, [1.0] * n).diverged


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_the_sign_flip_test_counts_all_flips(differences):
    observed = abs(sum(differences))
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    # Sums of the same numbers in another order differ by rounding.
    least, most = (np.mean([flip >= observed + slack for flip in flips]) for slack in (1e-9, -1e-9))
    assert least <= paired_difference(differences, [0] * len(differences)).p <= most


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [paired_difference(random.normal(0.3, 1, 3), np.zeros(3)) for _ in range(800)]
    share = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert 0.93 < share < 0.97
