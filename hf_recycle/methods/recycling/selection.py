"""Which neurons to recycle: criteria, and the choice itself.

To add a criterion, write a function here and decorate it; see CONTRIBUTING.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_recycle.methods.registry import CRITERIA


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
    k = min(max(k, 0), len(scores))
    lowest = torch.from_numpy(np.flatnonzero(_lowest(scores, eligible, k)))
    if len(lowest) > k:  # ties; only these are worth a stable sort
        lowest = lowest[torch.sort(scores[lowest], stable=True).indices[:k]].sort().values
    return lowest


def select_in_each(scores: Sequence[Tensor], eligible: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """As `select`, in each of several blocks; in all at once if they are alike. Returns indices for each block."""
    k, alike = ks[0], len({(len(block), k) for block, k in zip(scores, ks, strict=True)}) == 1
    if alike and 0 < k <= len(scores[0]):
        lowest = _lowest(torch.stack(list(scores)), torch.stack(list(eligible)), k)
        if (lowest.sum(1) == k).all():
            return list(torch.from_numpy(np.flatnonzero(lowest) % lowest.shape[1]).split(k))
    return [select(*arguments) for arguments in zip(scores, eligible, ks, strict=True)]


def _lowest(scores: Tensor, eligible: Tensor, k: int) -> np.ndarray:
    """The eligible neurons whose score is not above the k-th lowest, bool `(..., d_ff)`: `k` of them, more for ties, or
    fewer if fewer are eligible. In NumPy, which has these operations in half the time on a CPU."""
    values, mask = scores.to(torch.promote_types(scores.dtype, torch.float32)).numpy(), eligible.numpy()
    if k == 0:
        return np.zeros_like(mask)
    candidates = values if mask.all() else np.where(mask, values, np.inf)
    limit = np.partition(candidates, k - 1)[..., k - 1 : k]
    return mask & ~(values > limit)


def select_globally(scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int) -> list[Tensor]:
    """As `select`, but `k` neurons over all blocks together. Returns indices for each block."""
    sizes = [len(block) for block in scores]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[select(torch.cat(list(scores)), torch.cat(list(eligible)), k)] = True
    return [block.nonzero().flatten() for block in chosen.split(sizes)]


def is_immune(last_phase: Tensor, phase: int, immunity: int) -> Tensor:
    """Which neurons may not be selected in phase number `phase`.

    A neuron recycled in phase p is immune in the phases p + 1 ... p + immunity: exactly `immunity` of them.

    Args:
        last_phase: int `(d_ff,)`, the number of the phase that recycled each neuron last, 0 for never. Phases count
            from 1.

    Returns:
        bool `(d_ff,)`.
    """
    return last_phase >= max(phase - immunity, 1)
