"""What paired measurements say: medians, and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A median over pairs.

    Attributes:
        median: of the pairs.
        low, high: an interval that holds the true median with 95% confidence, by order statistics: it assumes nothing
            of the noise but that pairs are independent. With fewer than six pairs, their range.
        pairs: how many.
    """

    median: float
    low: float
    high: float
    pairs: int


def estimate(values: Sequence[float]) -> Estimate:
    """The median of at least one value, with its interval."""
    ordered = sorted(values)
    n, rank = len(ordered), _rank(len(ordered))
    return Estimate(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank], n)


def spread(values: Sequence[float]) -> float:
    """Distance between the quartiles, in medians: what a machine's noise makes of one and the same work."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def _rank(n: int) -> int:
    """How many values may be left out at each end so that the rest holds the median with 95% confidence."""
    rank, outside = 0, 2.0**-n
    while 2 * (outside + math.comb(n, rank + 1) * 2.0**-n) <= 0.05:
        rank += 1
        outside += math.comb(n, rank) * 2.0**-n
    return rank
