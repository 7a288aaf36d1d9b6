"""Which neurons to recycle: criteria, and the choice itself.

To add a criterion, write a function here and decorate it; see CONTRIBUTING.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_recycle.methods.registry import Registry


@dataclass(frozen=True)
class Signals:
    """What a criterion may look at, for one block.

    Attributes:
        magnitudes: float32 `(d_ff,)` on the CPU.
        generator: the random generator of this phase and block; the only source of randomness.
    """

    magnitudes: Tensor
    generator: torch.Generator


CRITERIA: Registry[Callable[[Signals], Tensor]] = Registry("selection criterion")


@CRITERIA.register
def low_magnitude(signals: Signals) -> Tensor:
    """the smallest neurons first (the article's method)"""
    return signals.magnitudes


@CRITERIA.register
def high_magnitude(signals: Signals) -> Tensor:
    """the largest neurons first (a control)"""
    return -signals.magnitudes


@CRITERIA.register
def random(signals: Signals) -> Tensor:
    """any neuron (a control)"""
    return torch.rand(len(signals.magnitudes), generator=signals.generator)


def select(scores: Tensor, eligible: Tensor, k: int) -> Tensor:
    """The `k` eligible neurons of lowest score; fewer if fewer are eligible.

    Args:
        scores: `(d_ff,)`; least first. Ties go to the lower index.
        eligible: bool `(d_ff,)`.

    Returns:
        Ascending int64 indices.
    """
    candidates = eligible.nonzero().flatten()
    order = torch.sort(scores[candidates], stable=True).indices
    return candidates[order[: max(k, 0)]].sort().values


def select_globally(scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int) -> list[Tensor]:
    """As `select`, but `k` neurons over all blocks together. Returns indices for each block."""
    sizes = [len(block) for block in scores]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[select(torch.cat(list(scores)), torch.cat(list(eligible)), k)] = True
    return [block.nonzero().flatten() for block in chosen.split(sizes)]
