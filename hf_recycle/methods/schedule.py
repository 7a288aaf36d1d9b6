"""When phases happen and how many neurons each may take: pure functions of the optimizer step.

Counts are exact: fractions are read as the decimal the user wrote and accumulated as rationals, so that 0.001 of 512
neurons is one about every second phase, and 0.1 of 2048 taken ten times is 2048.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

FRACTION_SCHEDULES = ("constant", "linear", "cosine")


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

    def is_phase(self, step: int) -> bool:
        return 0 < step < self.last_step and self.start <= step <= self.end and (step - self.start) % self.every == 0

    def phases_until(self, step: int) -> range:
        """The steps of all phases up to and including `step`."""
        first = self.start if self.start > 0 else self.every
        return range(first, min(step, self.end, self.last_step - 1) + 1, self.every)

    def fraction_at(self, step: int) -> Fraction:
        """The share of neurons that the phase at `step` may take."""
        fraction = Fraction(str(self.fraction))
        if self.decay == "constant":
            return fraction
        progress = Fraction(step - self.start, max(self.end - self.start, 1))
        if self.decay == "linear":
            return fraction * (1 - progress)
        # Rounded to a decimal, so that every machine and process sees the same rational.
        return fraction * Fraction(str(round((1 + math.cos(math.pi * float(progress))) / 2, 12)))

    def quota(self, step: int, neurons: int) -> int:
        """Neurons the phase at `step` recycles out of `neurons`: ⌊p·k⌋ − ⌊(p−1)·k⌋ for the p-th phase, k = fraction
        · neurons; with a decay, the same of the running sum."""
        phases = self.phases_until(step)
        if self.decay == "constant":
            until, before = len(phases) * self.fraction_at(step), (len(phases) - 1) * self.fraction_at(step)
        else:
            before = sum((self.fraction_at(t) for t in phases[:-1]), Fraction(0))
            until = before + self.fraction_at(phases[-1])
        return math.floor(until * neurons) - math.floor(before * neurons)


def resolve_steps(value: float | None, total: int) -> int | None:
    """A number of steps: an integer as it is, a fraction below 1 as that share of `total`, rounded up (as the
    Trainer does with `save_steps`); None stays None."""
    if value is None:
        return None
    return math.ceil(Fraction(str(value)) * total) if value < 1 else int(value)
