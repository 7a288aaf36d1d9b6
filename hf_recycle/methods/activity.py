"""Dead and dormant neurons, told by their mean |h| over some text; h is the input of the out-projection."""

from dataclasses import dataclass

from torch import Tensor

from hf_recycle.methods.recycling.selection import over_mean

DORMANT = 0.025
"""A neuron is dormant if its mean |h| is at most this share of its layer's mean. (Sokar et al. 2023, ReDo.)"""

WORTH_RECYCLING = 0.2
"""The share of a model's neurons that must be dead or dormant for recycling to be worth it: a healthy model pays."""


@dataclass(frozen=True)
class Activity:
    """How many neurons of one block are idle.

    Attributes:
        neurons: all but the pruned ones.
        dead: of these, those whose h was exactly 0 at every position.
        dormant: of these, those with a mean |h| of at most `DORMANT` over the layer's mean; the dead are among them.
    """

    neurons: int
    dead: int
    dormant: int

    @classmethod
    def of(cls, mean_abs: Tensor, pruned: Tensor) -> "Activity":
        """Args:
        mean_abs: mean |h| of each neuron, `(d_ff,)`.
        pruned: bool `(d_ff,)`.
        """
        counted = ~pruned
        idle = (counted, is_dead(mean_abs) & counted, is_dormant(mean_abs) & counted)
        return cls(*(int(mask.sum()) for mask in idle))


def is_dead(mean_abs: Tensor) -> Tensor:
    """Which neurons never fired, bool `(d_ff,)`, by the mean |h| of each, `(d_ff,)`."""
    return mean_abs == 0


def is_dormant(mean_abs: Tensor) -> Tensor:
    """Which neurons are dormant, the dead among them, bool `(d_ff,)`; the score is that of the criterion `dormant`."""
    return over_mean(mean_abs) <= DORMANT
