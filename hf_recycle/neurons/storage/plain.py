"""Parameters that are ordinary tensors, whole on each process: one process, or DDP."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_recycle.neurons.storage.base import Storage
from hf_recycle.neurons.storage.tiles import Tile, to_device

if TYPE_CHECKING:
    from hf_recycle.neurons.blocks import NeuronSlice


class PlainStorage(Storage):
    """One tile, which is all there is."""

    sharded = False

    def tiles(self, piece: "NeuronSlice") -> list[Tile]:
        return whole(piece, piece.parameter)

    def gradient_tiles(self, piece: "NeuronSlice") -> list[Tile]:
        gradient = piece.parameter.grad
        return [] if gradient is None else whole(piece, gradient)

    def optimizer_state(self, optimizer, piece: "NeuronSlice") -> dict[str, list[Tile] | Tensor]:
        state = optimizer.state.get(piece.parameter, {})
        alike = piece.parameter.shape
        return {
            key: whole(piece, value) if isinstance(value, Tensor) and value.shape == alike else value
            for key, value in state.items()
        }

    def write_full(self, piece: "NeuronSlice", index: Tensor, lines: Tensor) -> None:
        # As the general way does, in fewer operations: the one tile holds all of each line.
        [tile] = self.tiles(piece)
        tile.write(to_device(index, tile.values.device), lines.unsqueeze(1) if piece.is_bias else lines)

    def sum_over_processes(self, piece: "NeuronSlice", values: Tensor) -> Tensor:
        return values


def whole(piece: "NeuronSlice", tensor: torch.Tensor) -> list[Tile]:
    """The one tile of a tensor laid out like the slice's parameter."""
    tensor = tensor.detach()
    matrix = tensor.unsqueeze(1) if piece.is_bias else tensor
    lines = matrix.T if piece.dim else matrix
    if piece.length < lines.shape[0]:
        lines = lines[piece.offset : piece.offset + piece.length]
    return [Tile(lines, 0, 0, True)]
