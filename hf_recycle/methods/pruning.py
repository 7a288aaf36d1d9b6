"""How many neurons of a layer are pruned when: a pure function of the optimizer step.

Source: *Neuron Recycling*, section "Gradual FF pruning" (linear); Zhu & Gupta, *To prune, or not to prune* (2017),
for the cubic schedule. The share counts all neurons of a layer and is cumulative: linear from step 10k
to 80k, 20% of the final share are pruned at 24k.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

PRUNE_SCHEDULES = ("linear", "cubic")


@dataclass(frozen=True)
class PruningSchedule:
    """The course of pruning over one run.

    Pruning happens right after optimizer step t when `start <= t <= end` and `(t - start) % every == 0`, and at `end`
    itself, so that the final share is reached also if `every` does not divide the way there.

    Attributes:
        every: steps between prunings.
        start: the step at which the share begins to grow from 0; with `end == start` all is pruned at once.
        end: the step at which the final share is reached.
        fraction: final share of the neurons of each layer.
        shape: linear, or cubic (fast at first, then slower and slower).
    """

    every: int
    start: int
    end: int
    fraction: float
    shape: str = "linear"

    def is_due(self, step: int) -> bool:
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def target(self, step: int, neurons: int) -> int:
        """How many of a layer's `neurons` are to be pruned at `step`: the share, rounded down, exactly."""
        if step < self.start:
            return 0
        progress = min(Fraction(step - self.start, self.end - self.start), 1) if self.end > self.start else 1
        if self.shape == "cubic":
            progress = 1 - (1 - progress) ** 3
        return math.floor(Fraction(str(self.fraction)) * progress * neurons)
