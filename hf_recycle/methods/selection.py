"""Which neurons to recycle: criteria, and the choice itself.

To add a criterion, write a function here and decorate it; see CONTRIBUTING.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_recycle.methods.registry import Registry


@dataclass(frozen=True)
class Signals:
    """What a criterion may look at, for one block.

    Attributes:
        magnitudes: float32 `(d_ff,)` on the CPU.
        make_generator: gives `generator`; called at its first use, because most criteria draw nothing.
    """

    magnitudes: Tensor
    make_generator: Callable[[], torch.Generator]

    @cached_property
    def generator(self) -> torch.Generator:
        """The random generator of this phase and block; the only source of randomness."""
        return self.make_generator()


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
    k = min(max(k, 0), len(candidates))
    if k == 0:
        return candidates[:0]
    scores = scores.index_select(0, candidates)
    lowest = (~(scores > scores.topk(k, largest=False).values[-1])).nonzero().flatten()
    if len(lowest) > k:  # ties with the k-th score; only these are worth a stable sort
        lowest = lowest[torch.sort(scores[lowest], stable=True).indices[:k]].sort().values
    return candidates.index_select(0, lowest)


def select_globally(scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int) -> list[Tensor]:
    """As `select`, but `k` neurons over all blocks together. Returns indices for each block."""
    sizes = [len(block) for block in scores]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[select(torch.cat(list(scores)), torch.cat(list(eligible)), k)] = True
    return [block.nonzero().flatten() for block in chosen.split(sizes)]
