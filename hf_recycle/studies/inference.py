"""Differences between arms over seeds: paired, with their uncertainty."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIVERGED = "a run diverged"
"""In the place of a number, where the loss of a run is not finite."""

_MAX_EXACT = 16  # seeds up to which all sign flips are counted: 65,536 of them


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference of an arm from the baseline over seeds that both ran.

    Attributes:
        mean: arm minus baseline; not finite if a run diverged.
        low, high: 95% confidence interval by Student's t; None with one seed, or if a run diverged.
        p: two-sided p-value of the exact sign-flip test; None with one seed or more than 16, or if a run diverged. The
            smallest possible is 2^(1 − n): 0.25 with three seeds.
        seeds: n.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int

    @property
    def diverged(self) -> bool:
        """Whether the loss of a run, of either arm, was not finite."""
        return not math.isfinite(self.mean)


def paired_difference(arm: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Compares the results of two arms, seed by seed: `(n,)` each, in the same order of seeds."""
    with np.errstate(invalid="ignore"):  # of two infinite losses
        differences = np.asarray(arm, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
        n, mean = len(differences), float(differences.mean())
    # Nothing compares with NaN: a test would count no sign flip, which looks like the smallest p of all.
    if n < 2 or not np.isfinite(differences).all():
        return PairedDifference(mean, None, None, None, n)
    half = student_t_quantile(0.975, n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return PairedDifference(mean, mean - half, mean + half, _sign_flip(differences), n)


def _sign_flip(differences: np.ndarray) -> float | None:
    if len(differences) > _MAX_EXACT:
        return None
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    means = np.abs(signs @ differences)
    return float((means >= abs(differences.sum()) * (1 - 1e-12)).mean())


def student_t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t distribution for `0.5 <= p < 1` and up to 10,000 degrees of freedom.

    With t = √df · tan θ the density becomes cos^(df−1) θ, which Gauss-Legendre quadrature integrates to rounding; the
    quantile is found by bisection on θ.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def mass(angle: float) -> float:
        points = angle / 2 * (nodes + 1)
        return float(angle / 2 * (weights * np.cos(points) ** (df - 1)).sum())

    low, high, half = 0.0, math.pi / 2, mass(math.pi / 2)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + mass(middle) / half / 2 < p else (low, middle)
    return math.sqrt(df) * math.tan(low)
