"""One pass over a block's weights: norms, and a sketch in which near-equal neurons can be found."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_recycle.errors import UserError
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.storage.tiles import Tile

SKETCH = 128
"""Columns of the sketch. The squared distance of two of its rows is that of the neurons times chi²(128) / 128."""

Tiles = Callable[[NeuronSlice], Iterable[Tile]]
"""How the weights of a slice are reached: from memory (`in_memory`) or from a checkpoint (`Checkpoint.tiles`)."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a block gives.

    Attributes:
        in_norm: L2 norm of each neuron's in-row, gate and up together, float64 `(d_ff,)`.
        out_norm: L2 norm of each neuron's out-column, float64 `(d_ff,)`.
        sketch: random projection of each neuron's direction (see `hf_recycle.analysis.duplicates`), float32
            `(d_ff, SKETCH)`; a neuron without direction has a row of zeros.
    """

    in_norm: Tensor
    out_norm: Tensor
    sketch: Tensor

    @property
    def magnitudes(self) -> Tensor:
        """`‖W_in[i]‖₂ · ‖W_out[:, i]‖₂`, float32 `(d_ff,)`."""
        return (self.in_norm * self.out_norm).float()

    @property
    def has_direction(self) -> Tensor:
        """Whether neither norm is zero, bool `(d_ff,)`."""
        return (self.in_norm > 0) & (self.out_norm > 0)


def in_memory(piece: NeuronSlice) -> Iterable[Tile]:
    """The tiles of a model whose weights are loaded."""
    return piece.storage.tiles(piece)


def scan(block: FeedForward, tiles: Tiles) -> Scan:
    """Reads every weight and bias of a block once.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(0)
    squares = {"in": torch.zeros(block.num_neurons, dtype=torch.float64)}
    squares["out"] = squares["in"].clone()
    sketches = {side: torch.zeros(block.num_neurons, SKETCH) for side in squares}
    for piece in block.slices:
        side = "out" if piece.role == "out" else "in"
        projection = None if piece.is_bias else torch.randn(piece.width, SKETCH, generator=generator)
        for tile in tiles(piece):
            _check_finite(block, piece, tile)
            if projection is None:
                continue
            values = tile.values.float()
            squares[side][tile.neurons] += values.double().square().sum(1)
            sketches[side][tile.neurons].addmm_(values, projection[tile.features])
    in_norm, out_norm = squares["in"].sqrt(), squares["out"].sqrt()
    return Scan(in_norm, out_norm, _join(sketches["in"], in_norm, sketches["out"], out_norm))


def _join(sketch: Tensor, in_norm: Tensor, out_sketch: Tensor, out_norm: Tensor) -> Tensor:
    """The sketch of the two unit halves, scaled so that a neuron's whole direction has length about one."""
    alive = (in_norm > 0) & (out_norm > 0)
    for half, norm in ((sketch, in_norm), (out_sketch, out_norm)):
        half.mul_((alive / (norm.where(alive, 1.0) * (2 * SKETCH) ** 0.5)).float().unsqueeze(1))
    return sketch.add_(out_sketch)


def _check_finite(block: FeedForward, piece: NeuronSlice, tile: Tile) -> None:
    # The sum is not finite if one entry is not; an overflow of huge finite entries is ruled out by the second look.
    if torch.isfinite(tile.values.sum(dtype=torch.float64)):
        return
    bad = (~torch.isfinite(tile.values)).any(1)
    if bad.any():
        first = tile.neuron + int(bad.nonzero()[0])
        raise UserError(
            f"block {block.name}: the weights ({piece.role}) of {int(bad.sum())} neurons, the first of them {first}, "
            "are NaN or infinite; this checkpoint is broken, use an earlier one"
        )
