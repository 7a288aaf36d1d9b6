"""Midpoint loss: a plain gradient step that evens out neuron magnitudes.

Source: *Neuron Recycling*, section "Tangent - Midpoint Loss".

    Loss = Σ_i dist(g(M_i), stop_grad(center g(M)))        M_i = ‖w_in,i‖ · ‖w_out,i‖

Its gradient has a closed form that scales each neuron's in-row and out-column, so the step is one multiplication.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from hf_recycle.methods.base import Method, Run, StepInfo, refuse_half_precision
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.settings import MidpointSettings
from hf_recycle.neurons.blocks import NeuronSlice, norms_of
from hf_recycle.neurons.optimizer_state import check_optimizer
from hf_recycle.neurons.storage.tiles import to_device

_MOST_GROWTH = 10.0


@dataclass(frozen=True)
class MidpointLoss:
    """One variant of the loss.

    Attributes:
        distance: "l1": |x|, "l2": x².
        center: "mean", or "median" (the lower of the two middle values, as `torch.median`).
        log: g is the logarithm instead of the identity. Neurons of magnitude zero then have no place on the axis and
            are left out of the center.
        below_only: only neurons below the center contribute; the center is still that of all.
    """

    distance: str = "l1"
    center: str = "mean"
    log: bool = False
    below_only: bool = False

    def terms(self, magnitudes: Tensor, included: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its derivative by g(M_i), for one block or several of one size. Nothing waits for the device.

        Args:
            magnitudes: `(..., d_ff)`.
            included: bool `(..., d_ff)`; the others count neither in the sum nor in the center.

        Returns:
            The loss of each block `(...)`, and the derivative `(..., d_ff)`, zero where a neuron does not contribute.
        """
        if self.log:
            included = included & (magnitudes > 0)
        values = magnitudes.log() if self.log else magnitudes
        values = torch.where(included, values, 0)
        difference = values - self._center(values, included)
        active = included & (difference < 0) if self.below_only else included
        difference = torch.where(active, difference, 0)
        if self.distance == "l1":
            return difference.abs().sum(-1), difference.sign()
        return difference.square().sum(-1), 2 * difference

    def _center(self, values: Tensor, included: Tensor) -> Tensor:
        """`(..., 1)`; any number where no neuron is included."""
        count = included.sum(-1, keepdim=True)
        if self.center == "mean":
            return values.sum(-1, keepdim=True) / count.clamp(min=1)
        ascending = torch.where(included, values, torch.inf).sort(-1).values
        return ascending.gather(-1, ((count - 1) // 2).clamp(min=0))

    def slopes(self, in_norm: Tensor, out_norm: Tensor, included: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each block and its gradient, which is a multiple of each neuron's own weights.

        ∂M/∂w_in = w_in · ‖w_out‖ / ‖w_in‖ and ∂log M/∂w = w / ‖w‖²; a neuron with a norm of zero, or one
        whose square is near the end of the dtype's range, gets no gradient, and does not count if it is too large.

        Args:
            in_norm, out_norm: `(..., d_ff)`.
            included: bool `(..., d_ff)`, see `terms`.

        Returns:
            The losses `(...)`, and `(..., d_ff)` each, a and b, so that ∂Loss/∂w_in,i = a_i · w_in,i and
            ∂Loss/∂w_out,i = b_i · w_out,i.
        """
        limits = torch.finfo(in_norm.dtype)
        least, most = limits.tiny**0.4, limits.max**0.4  # so that the slopes, with squares in them, are finite
        included = included & (in_norm < most) & (out_norm < most)
        loss, derivative = self.terms(in_norm * out_norm, included)
        alive = included & (in_norm > least) & (out_norm > least)
        one = torch.ones_like(in_norm)
        safe_in, safe_out = torch.where(alive, in_norm, one), torch.where(alive, out_norm, one)
        if self.log:
            by_in, by_out = safe_in.square().reciprocal(), safe_out.square().reciprocal()
        else:
            by_in, by_out = safe_out / safe_in, safe_in / safe_out
        derivative = torch.where(alive, derivative, 0)
        return loss, derivative * by_in, derivative * by_out

    def factor(self, slope: Tensor, size: float | Tensor) -> Tensor:
        """What a step of this size multiplies weights by whose slope, of `slopes`, is `slope`.

        A logarithm is the steeper the smaller the weights, without bound, so that a step would throw the smallest
        farther out than the largest lie: with `log` it makes weights ten times as large at most.
        """
        factor = 1 - size * slope
        return factor.clamp(-_MOST_GROWTH, _MOST_GROWTH) if self.log else factor


logger = logging.get_logger(__name__)

Slopes = tuple[Tensor, Tensor]


class Midpoint(Method[MidpointSettings]):
    """Takes a midpoint step after each step of the optimizer."""

    settings_class = MidpointSettings

    def start(self, run: Run, settings: MidpointSettings) -> None:
        super().start(run, settings)
        self._loss = MidpointLoss(settings.distance, settings.center, settings.log, settings.below_only)
        self._losses: list[Tensor] = []
        self._checked_for_effect = False
        self._left_out: set[int] = set()
        self._said: set[int] = set()
        check_optimizer(run.optimizer, "midpoint_weight", settings.weight)
        pieces = (piece for block in run.table.blocks for piece in block.slices)
        refuse_half_precision(pieces, f"midpoint_weight={settings.weight}")

    @torch.no_grad()
    def after_step(self, info: StepInfo) -> None:
        if not info.stepped:
            return
        frozen = self._frozen(info.step)
        # Blocks of one size are worked on together, and nothing waits for the device.
        norms = norms_of(self.table.blocks)
        alike: dict[tuple, list[int]] = {}
        for block_index, (in_norm, _) in enumerate(norms):
            if block_index not in frozen:
                alike.setdefault((in_norm.device, in_norm.dtype, len(in_norm)), []).append(block_index)
        parts = [(block_indices, *self._slopes(block_indices, norms)) for block_indices in alike.values()]
        if not self._checked_for_effect:
            self._checked_for_effect = True
            self._say_if_without_effect(parts)
        for block_indices, _, slopes in parts:
            self._take(block_indices, slopes, info.rate)
        self._losses = [losses.sum() for _, losses, _ in parts]

    def _frozen(self, step: int) -> set[int]:
        """Indices of the blocks that are not trained now; each causes one warning, however often it is frozen."""
        frozen = {index for index, block in enumerate(self.table.blocks) if block.is_frozen}
        if new := sorted(frozen - self._said):
            names = ", ".join(self.table.blocks[index].name for index in new)
            logger.warning(f"Step {step}: the midpoint loss leaves out {names}, whose weights are frozen.")
        self._said |= frozen
        self._left_out = frozen
        return frozen

    def _slopes(self, block_indices: list[int], norms: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Slopes]:
        """The losses `(blocks,)` of some blocks of one size and their slopes for in-rows and out-columns, each
        `(blocks, d_ff)`."""
        in_norms, out_norms = (torch.stack(side) for side in zip(*(norms[p] for p in block_indices), strict=True))
        states = [self.table.states[block_index] for block_index in block_indices]
        left_out = torch.stack([state.fading_in() | state.pruned for state in states])
        losses, of_in, of_out = self._loss.slopes(in_norms, out_norms, to_device(~left_out, in_norms.device))
        return losses, (of_in, of_out)

    def _take(self, block_indices: list[int], slopes: Slopes, rate_of: Callable[[NeuronSlice], float | Tensor]) -> None:
        """Takes the step: one multiplication of each matrix."""
        factors: dict[tuple, Tensor] = {}
        for row, block_index in enumerate(block_indices):
            for piece in self.table.blocks[block_index].weight_slices:
                rate, is_out = rate_of(piece), piece.role == "out"
                key = is_out, id(rate) if isinstance(rate, Tensor) else rate
                if key not in factors:
                    factors[key] = self._loss.factor(slopes[is_out], rate * self.settings.weight)
                piece.storage.scale(piece, factors[key][row])

    def _say_if_without_effect(self, parts: list[tuple[list[int], Tensor, Slopes]]) -> None:
        for block_indices, _, slopes in parts:
            for row, block_index in enumerate(block_indices):
                for piece in self.table.blocks[block_index].weight_slices:
                    rate, slope = self.run.watch.highest_rate(piece), slopes[piece.role == "out"][row]
                    if (self._loss.factor(slope, rate * self.settings.weight) != 1).any():
                        return
        logger.warning(
            f"midpoint_weight={self.settings.weight} changes no weight at this learning rate: the step is below the "
            "resolution of the weights' dtype."
        )

    def scalars(self) -> dict[str, float]:
        """The midpoint loss before the last step, unweighted, summed over blocks; blocks that it left out, if any."""
        if not self.has_started or not self._losses:
            return {}
        left_out = {"midpoint_blocks_left_out": len(self._left_out)} if self._left_out else {}
        return {"midpoint_loss": sum(map(float, self._losses)), **left_out}


class MidpointLossCallback(NeuronCallback):
    """Midpoint loss: after every optimizer step, one plain gradient step that evens out neuron magnitudes.

    Source: *Neuron Recycling*, section "Tangent - Midpoint Loss". W ← W − lr · weight · ∇Loss, with the learning
    rate of the optimizer step just taken, no momentum, not clipped; pruned neurons and neurons in
    fade-in are left out, and so are blocks that are frozen at that time. With a learning
    rate of 1e-3 and a weight of 1e-7 the step is below the resolution of float32 and changes no weight; that is said
    once.

    Takes the settings of `RecyclingArguments` whose names begin with `midpoint_`, without that prefix. On a stock
    `Trainer` it does all it does on a `RecyclingTrainer`, except that its loss is not logged.
    """

    method_class = Midpoint
