"""Which neurons are overtrained, and how the learning rate warms up: pure functions.

Source: *Neuron Recycling*, section "Understanding neuron magnitudes" ("overtraining feed-forward layer").
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from hf_recycle.methods.recycling.selection import CRITERIA, Signals, select

SUBSETS = {"all": None, "smallest": "low_magnitude", "largest": "high_magnitude", "random": "random"}
"""The subsets by name, with the selection criterion that finds each."""


def subset_size(fraction: float, neurons: int) -> int:
    """How many of a layer's `neurons` a subset has: the share of all of them, rounded down, exactly."""
    return math.floor(Fraction(str(fraction)) * neurons)


def choose(
    magnitudes: Tensor, available: Tensor, subset: str, fraction: float, make_generator: Callable[[], torch.Generator]
) -> Tensor:
    """The neurons of one layer to overtrain.

    Args:
        magnitudes: float32 `(d_ff,)` on the CPU.
        available: bool `(d_ff,)`, false for neurons that are pruned or fading in.
        subset: one of `SUBSETS`.
        fraction: share of the `d_ff` neurons; "all" takes every available one.
        make_generator: for "random".

    Returns:
        Ascending int64 indices; fewer than the share if fewer are available.
    """
    criterion = SUBSETS[subset]
    if criterion is None:
        return available.nonzero().flatten()
    scores = CRITERIA[criterion](Signals(magnitudes, make_generator))
    return select(scores, available, subset_size(fraction, len(magnitudes)))


def warm_up(batch: int, batches: int) -> float:
    """The factor on the learning rate of batch number `batch`, from 1: linear over the first tenth of the `batches`
    (at least one of them), w in all, as batch / (w + 1); then 1."""
    length = math.ceil(batches / 10)
    return min(1.0, batch / (length + 1))
