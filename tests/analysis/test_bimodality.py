import numpy as np
import pytest
from scipy.optimize import linprog

from hf_recycle.analysis.bimodality import dip, dip_p_value


def nearest_unimodal(values):
    """The dip as a linear program: of all distribution functions that are convex up to one of the values, may jump
    there, and are concave after it, the least largest distance from the empirical one."""
    x = np.sort(values)
    n, slopes = len(x), 1 / np.diff(np.sort(values))
    distances = []
    for mode in range(n):
        # Unknowns: the function left of and at the mode, at (after its jump) and right of it, the distance.
        places = [*range(mode + 1), *range(mode, n)]
        rows, bounds = [], []

        def at_most(bound, rows=rows, bounds=bounds, size=n + 2, **weights):
            row = np.zeros(size)
            for key, weight in weights.items():
                row[int(key[1:])] += weight
            rows.append(row)
            bounds.append(bound)

        last = len(places)
        for i, place in enumerate(places):
            before, after = place / n, (place + 1) / n
            at_most(after if i == mode + 1 else before, **{f"v{i}": 1, f"v{last}": -1})
            at_most(-(before if i == mode else after), **{f"v{i}": -1, f"v{last}": -1})
            if i:
                at_most(0, **{f"v{i - 1}": 1, f"v{i}": -1})
        for i in range(1, last - 1):
            left, right = places[i - 1 : i + 1], places[i : i + 2]
            if left[0] == left[1] or right[0] == right[1]:
                continue
            s, t = slopes[left[0]], slopes[right[0]]
            sign = 1 if places[i] <= mode and i <= mode else -1
            at_most(0, **{f"v{i}": sign * (s + t), f"v{i - 1}": -sign * s, f"v{i + 1}": -sign * t})
        cost = np.zeros(last + 1)
        cost[-1] = 1
        done = linprog(cost, A_ub=np.array(rows), b_ub=bounds, bounds=[(None, None)] * (last + 1))
        distances.append(done.fun)
    return max(min(distances), 0.5 / n)


@pytest.mark.parametrize("seed", range(40))
def test_the_dip_is_the_distance_from_the_nearest_unimodal_distribution(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 12))
    values = random.random(n) if seed % 2 else np.r_[random.normal(0, 0.1, n), random.normal(1, 0.1, n)]
    assert dip(values) == pytest.approx(nearest_unimodal(values), abs=1e-7)


def test_extremes():
    assert dip(np.arange(20.0)) == pytest.approx(1 / 40)
    assert dip(np.r_[np.zeros(50), np.ones(50)]) == pytest.approx(0.25)
    assert dip(np.ones(7)) == pytest.approx(1 / 14)
    assert dip_p_value(dip(np.ones(0)), 0) == 1


def test_scale_and_order_do_not_matter():
    values = np.random.default_rng(0).gamma(2, size=300)
    assert dip(values) == pytest.approx(dip(3 - 7 * values[::-1]))


def test_p_values_of_uniform_samples_are_uniform():
    random = np.random.default_rng(1)
    p = np.array([dip_p_value(dip(random.random(1200)), 1200) for _ in range(200)])
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert (p < level).mean() == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 200))


@pytest.mark.parametrize("draw", ["normal", "exponential", "lognormal"])
def test_one_mode_is_not_taken_for_two(draw):
    values = getattr(np.random.default_rng(2), draw)(size=2048)
    assert dip_p_value(dip(values), 2048) > 0.5


def test_two_modes_are_found():
    random = np.random.default_rng(3)
    values = np.r_[random.normal(0.4, 0.05, 1800), random.normal(0.8, 0.05, 248)]
    assert dip_p_value(dip(values), len(values)) < 0.01
