"""Midpoint loss: a plain gradient step that evens out neuron magnitudes.

Source: *Neuron Recycling*, section "Tangent - Midpoint Loss".

    Loss = Σ_i dist(g(M_i), stop_grad(center g(M)))        M_i = ‖w_in,i‖ · ‖w_out,i‖

Its gradient has a closed form that scales each neuron's in-row and out-column, so the step is one multiplication.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DISTANCES = ("l1", "l2")
CENTERS = ("mean", "median")

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
