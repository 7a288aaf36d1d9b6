"""Grouping of "times recycled", so that a table or a figure of it stays short."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TimesGroup:
    """Neurons recycled between `low` and `high` times, both included."""

    low: int
    high: int

    @property
    def label(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"

    def count(self, counts: np.ndarray) -> int:
        """How many of the neurons with these `counts` (any integer array) are in the group."""
        return int(((counts >= self.low) & (counts <= self.high)).sum())


def group_times(counts: np.ndarray, most: int) -> list[TimesGroup]:
    """At most `most` (two or more) groups that together cover 0 to the largest of `counts`.

    One group per value where that is few enough; else 0 by itself, since "never" means something else, and
    equally wide groups after it.
    """
    largest = int(counts.max(initial=0))
    if largest < most:
        return [TimesGroup(value, value) for value in range(largest + 1)]
    width = -(-largest // (most - 1))
    return [
        TimesGroup(0, 0),
        *(TimesGroup(low, min(low + width - 1, largest)) for low in range(1, largest + 1, width)),
    ]
