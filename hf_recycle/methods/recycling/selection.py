"""Which neurons to recycle: criteria, and the choice itself.

To add a criterion, write a function here and decorate it; see CONTRIBUTING. In the formulas h are the activations of a
neuron, which the out-projection multiplies by its out-column.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_recycle.methods.folding import damped
from hf_recycle.methods.registry import CRITERIA, needs


@dataclass(frozen=True)
class Signals:
    """What a criterion may look at, for one block.

    Attributes:
        magnitudes: float32 `(d_ff,)` on the CPU.
        make_generator: gives `generator`; called at its first use, because most criteria draw nothing.
        read_out_columns: gives `out_columns`.
        statistics: what the criterion says by `needs` that it looks at, see `registry.STATISTICS`.
        eligible: bool `(d_ff,)`, the neurons that may be chosen; None: all.
        count: how many may be chosen at most.
    """

    magnitudes: Tensor
    make_generator: Callable[[], torch.Generator]
    read_out_columns: Callable[[], Tensor] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    eligible: Tensor | None = None
    count: int = 0

    @cached_property
    def generator(self) -> torch.Generator:
        """The random generator of this phase and block; the only source of randomness."""
        return self.make_generator()

    @cached_property
    def out_columns(self) -> Tensor:
        """The out-projection, a row for each neuron: float64 `(d_ff, d_model)` on the CPU."""
        assert self.read_out_columns is not None, "the criterion looks at the out-projection"
        return self.read_out_columns().detach().cpu().double()


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


@CRITERIA.register
@needs("mean_abs")
def dormant(signals: Signals) -> Tensor:
    """the least active first: mean |h| over the layer's mean of it (Sokar et al. 2023, ReDo)"""
    return over_mean(signals.statistics["mean_abs"])


@CRITERIA.register
@needs("mean_abs")
def contribution(signals: Signals) -> Tensor:
    """mean |h| times mean |out-column| (Dohare et al. 2024, "Loss of plasticity in deep continual learning")"""
    return signals.statistics["mean_abs"] * signals.out_columns.abs().mean(1)


@CRITERIA.register
@needs("taylor")
def fisher(signals: Signals) -> Tensor:
    """mean squared change of the loss, to first order, if h became its mean (squared Taylor expansion)"""
    return signals.statistics["taylor"]


@CRITERIA.register
@needs("in_gradient")
def gradient(signals: Signals) -> Tensor:
    """the least gradient first: mean |gradient of the in-row| over the layer's mean of it (GraMa)"""
    return over_mean(signals.statistics["in_gradient"])


@CRITERIA.register
@needs("mean", "second_moment")
def flap(signals: Signals) -> Tensor:
    """variance of h times ‖out-column‖² (An et al. 2023, FLAP); goes with fold=mean"""
    mean, second_moment = signals.statistics["mean"], signals.statistics["second_moment"]
    return (second_moment - mean.square()).clamp(min=0) * signals.out_columns.square().sum(1)


@CRITERIA.register
@needs("second_moment")
def wanda(signals: Signals) -> Tensor:
    """root mean square of h times sum |out-column| (Sun et al. 2023, Wanda)"""
    return signals.statistics["second_moment"].sqrt() * signals.out_columns.abs().sum(1)


@CRITERIA.register
@needs("second_moment")
def activation(signals: Signals) -> Tensor:
    """root mean square of h (Muralidharan et al. 2024, Minitron)"""
    return signals.statistics["second_moment"].sqrt()


@CRITERIA.register
@needs("cross_moment")
def obs(signals: Signals) -> Tensor:
    """the error of the block's output after the best fold, greedily (optimal brain surgeon); goes with least_squares"""
    everyone = torch.ones(len(signals.magnitudes), dtype=torch.bool)
    eligible = everyone if signals.eligible is None else signals.eligible
    return surgeon_scores(signals.statistics["cross_moment"], signals.out_columns, eligible, signals.count)


def over_mean(values: Tensor) -> Tensor:
    """`values` `(d_ff,)` >= 0 over their mean; zeros where all are zero."""
    mean = values.mean()
    return torch.where(mean > 0, values / mean, values)


def surgeon_scores(cross_moment: Tensor, out_columns: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Neurons in the order in which the optimal brain surgeon removes them, one at a time: each time the one that costs
    least, ‖v_i‖² / [C⁻¹]_ii, after which the others take over what it did as well as they can.

    (Hassibi & Stork 1993; Kurtic et al. 2023, ZipLM. C is damped, see `folding.damped`.)

    Args:
        cross_moment: C `(d_ff, d_ff)`.
        out_columns: v, `(d_ff, d_model)`.
        eligible: bool `(d_ff,)`: those that may go.
        count: how many go; the others are scored by what they would cost then.

    Returns:
        What each costs, never less than one that went before: float64 `(d_ff,)` on the CPU.
    """
    inverse = torch.linalg.inv(damped(cross_moment))
    columns, left = out_columns.to(inverse, copy=True), eligible.to(inverse.device, copy=True)
    scores = torch.zeros(len(left), dtype=torch.float64)
    least = 0.0
    for _ in range(min(count, int(left.sum()))):
        costs = _costs(inverse, columns).masked_fill(~left, torch.inf)
        index = int(costs.argmin())
        least = scores[index] = max(float(costs[index]), math.nextafter(least, math.inf))
        left[index] = False
        line = inverse[index].clone()
        columns -= torch.outer(line / line[index], columns[index])
        inverse -= torch.outer(line, line / line[index])
        inverse[index, index] = 1.0  # gone: its column of `columns` is zero now, and so are its cross terms
    rest = _costs(inverse, columns).cpu().clamp(min=math.nextafter(least, math.inf))
    return torch.where(scores > 0, scores, rest)


def _costs(inverse: Tensor, columns: Tensor) -> Tensor:
    return columns.square().sum(1) / inverse.diagonal()


def others(count: int, index: Tensor) -> Tensor:
    """Which of `count` neurons are not in `index` `(n,)`: ascending int64 indices."""
    rest = torch.ones(count, dtype=torch.bool)
    rest[index] = False
    return rest.nonzero().flatten()


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
