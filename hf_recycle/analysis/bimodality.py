"""Has a distribution more than one mode? Hartigan's dip test.

Source: J. A. Hartigan and P. M. Hartigan, *The Dip Test of Unimodality*, The Annals of Statistics 13 (1985), 70-84. The
dip is the largest difference between the empirical distribution function and the unimodal distribution function that is
nearest to it; it lies between 1/(2n) and 1/4.
"""

import functools

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_DRAWS = 1000
_POINTS = 500


def dip(values: Array) -> float:
    """The dip of a sample of n values, `(n,)`: 1/(2n) for evenly spaced ones, near 1/4 for two distant clusters.

    Exact for distinct values; among many equal ones it may come out too large.

    The modal interval shrinks to where convex minorant and concave majorant of the distribution function lie furthest
    apart, until they lie no further apart than the function does from them outside the interval.
    """
    x, number = np.unique(np.asarray(values, np.float64), return_counts=True)
    n = int(number.sum())
    if len(x) < 2:
        return 0.5 / max(n, 1)
    upper = np.cumsum(number).astype(np.float64)
    lower = upper - number
    low, high = 0, len(x) - 1
    twice = 1.0  # twice the dip, in steps of the distribution function: it can't be nearer than half a step
    while True:
        convex = _hull(x, lower, low, high, sign=1)
        concave = _hull(x, upper, low, high, sign=-1)
        gap, left, right = _widest_gap(x, lower, upper, convex, concave)
        if gap <= twice:
            return float(twice) / (2 * n)
        # Outside the new interval the nearest unimodal function is convex left of it, concave right of it. At a single
        # mode it may jump.
        jump = left == right
        before, after = slice(low, left + (not jump)), slice(right + jump, high + 1)
        twice = max(
            twice,
            np.max(upper[before] - np.interp(x[before], x[convex], lower[convex]), initial=0.0),
            np.max(np.interp(x[after], x[concave], upper[concave]) - lower[after], initial=0.0),
        )
        if (low, high) == (left, right):
            return float(twice) / (2 * n)
        low, high = left, right


def _hull(x: Array, y: Array, low: int, high: int, sign: int) -> npt.NDArray[np.int64]:
    """Vertices of the greatest convex minorant (sign 1) or least concave majorant (sign -1) of the points `low` to
    `high`, ascending."""
    xs, ys = x.tolist(), (sign * y).tolist()
    vertices: list[int] = []
    for k in range(low, high + 1):
        while len(vertices) > 1:
            a, b = vertices[-2], vertices[-1]
            if (ys[b] - ys[a]) * (xs[k] - xs[a]) <= (ys[k] - ys[a]) * (xs[b] - xs[a]):
                break
            vertices.pop()
        vertices.append(k)
    return np.array(vertices)


def _widest_gap(
    x: Array, lower: Array, upper: Array, convex: npt.NDArray[np.int64], concave: npt.NDArray[np.int64]
) -> tuple[float, int, int]:
    """Where majorant and minorant lie furthest apart, at a vertex of one: the distance, and that vertex with the
    nearest vertex of the other, the convex one to the left."""
    at_convex = np.interp(x[convex], x[concave], upper[concave]) - lower[convex]
    at_concave = upper[concave] - np.interp(x[concave], x[convex], lower[convex])
    if at_convex.max() > at_concave.max():
        left = int(convex[at_convex.argmax()])
        return float(at_convex.max()), left, int(concave[np.searchsorted(concave, left)])
    right = int(concave[at_concave.argmax()])
    return float(at_concave.max()), int(convex[np.searchsorted(convex, right, side="right") - 1]), right


def dip_p_value(value: float, n: int) -> float:
    """Chance that a uniform sample of n values has at least this dip: the p-value of the test for one mode.

    The uniform is the unimodal distribution hardest to tell from bimodal ones. Its dips are drawn 1,000 times with a
    fixed seed, in samples of at most 500 values: √n · dip has nearly one distribution for all larger n.
    """
    size = min(max(n, 2), _POINTS)
    null = _uniform_dips(size)
    at_least = np.count_nonzero(null * np.sqrt(size) >= value * np.sqrt(n) - 1e-12)
    return float((at_least + 1) / (_DRAWS + 1))


@functools.cache
def _uniform_dips(size: int) -> Array:
    random = np.random.default_rng(0)
    return np.array([dip(random.random(size)) for _ in range(_DRAWS)])
