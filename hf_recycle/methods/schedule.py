"""When phases happen and how many neurons each may take: pure functions of the optimizer step.

Counts are exact: fractions are read as the decimal the user wrote and accumulated as rationals, so that 0.001 of 512
neurons is one about every second phase, and 0.1 of 2048 taken ten times is 2048.
"""

import math
import sys
from dataclasses import dataclass, field
from fractions import Fraction

FRACTION_SCHEDULES = ("constant", "linear", "cosine")

_DECIMALS = 12
"""Of a cosine: rounded, so that every machine and process sees the same rational."""


@dataclass(frozen=True)
class PhaseSchedule:
    """The selection phases of one run.

    A phase happens right after optimizer step t when `start <= t <= end` and `(t - start) % every == 0`, except on the
    last step of training, which nothing would follow.

    Attributes:
        every: steps between phases.
        start: first step.
        end: last step.
        last_step: the last step of training.
        fraction: share of neurons per phase.
        decay: constant, or linear or cosine to 0 at `end`.
    """

    every: int
    start: int
    end: int
    last_step: int
    fraction: float
    decay: str = "constant"
    _cosines: list[int] = field(default_factory=lambda: [0, 0], init=False, repr=False, compare=False)
    """How many phases were added up last, and their cosines' sum in units of the last decimal."""

    def is_phase(self, step: int) -> bool:
        return 0 < step < self.last_step and self.start <= step <= self.end and (step - self.start) % self.every == 0

    def phases_until(self, step: int) -> range:
        """The steps of all phases up to and including `step`."""
        first = self.start if self.start > 0 else self.every
        return range(first, min(step, self.end, self.last_step - 1, sys.maxsize - 1) + 1, self.every)

    def fraction_at(self, step: int) -> Fraction:
        """The share of neurons that the phase at `step` may take."""
        fraction = Fraction(str(self.fraction))
        if self.decay == "constant":
            return fraction
        if self.decay == "linear":
            return fraction * (1 - Fraction(step - self.start, self._length))
        return fraction * Fraction(self._cosine(step), 10**_DECIMALS)

    def quota(self, step: int, neurons: int) -> int:
        """Neurons the phase at `step` recycles out of `neurons`: ⌊p·k⌋ − ⌊(p−1)·k⌋ for the p-th phase, k = fraction
        · neurons; with a decay, the same of the running sum."""
        before = self._sum_of(len(self.phases_until(step)) - 1)
        return math.floor((before + self.fraction_at(step)) * neurons) - math.floor(before * neurons)

    def _sum_of(self, count: int) -> Fraction:
        """The shares of the first `count` phases together."""
        fraction = Fraction(str(self.fraction))
        if self.decay == "constant":
            return fraction * count
        first = self.phases_until(self.last_step).start
        if self.decay == "linear":
            behind = count * (first - self.start) + self.every * (count * (count - 1) // 2)
            return fraction * (count - Fraction(behind, self._length))
        done, total = self._cosines if self._cosines[0] <= count else (0, 0)
        total += sum(self._cosine(first + number * self.every) for number in range(done, count))
        self._cosines[:] = count, total
        return fraction * Fraction(total, 10**_DECIMALS)

    @property
    def _length(self) -> int:
        return max(self.end - self.start, 1)

    def _cosine(self, step: int) -> int:
        """The cosine's part of the fraction at `step`, in units of the last decimal."""
        share = (1 + math.cos(math.pi * float(Fraction(step - self.start, self._length)))) / 2
        return round(round(share, _DECIMALS) * 10**_DECIMALS)


def resolve_steps(value: float | None, total: int) -> int | None:
    """A number of steps: an integer as it is, a fraction below 1 as that share of `total`, rounded up (as the
    Trainer does with `save_steps`); None stays None."""
    if value is None:
        return None
    return math.ceil(Fraction(str(value)) * total) if value < 1 else int(value)


def resolved(value: float | None) -> int:
    """A number of steps, or a seed, of settings that `Settings.resolve` gave: there, and whole."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number: settings are resolved when training begins.")
    return value
