"""Parameters that are DTensors: FSDP2 (`fully_shard`), tensor parallelism, or both."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from hf_recycle.neurons.storage.base import Storage
from hf_recycle.neurons.storage.tiles import Tile, columns_of, runs, tiles_of_rectangle

if TYPE_CHECKING:
    from hf_recycle.neurons.blocks import NeuronSlice


class DTensorStorage(Storage):
    """The tiles are what `to_local()` holds; it is edited in place, because DTensor refuses indexed assignment."""

    def tiles(self, piece: "NeuronSlice") -> list[Tile]:
        return _local_tiles(piece, piece.parameter)

    def gradient_tiles(self, piece: "NeuronSlice") -> list[Tile]:
        gradient = piece.parameter.grad
        return [] if gradient is None else _local_tiles(piece, gradient)

    def optimizer_state(self, optimizer, piece: "NeuronSlice") -> dict[str, list[Tile] | Tensor]:
        state = optimizer.state.get(piece.parameter, {})
        alike = piece.parameter.shape
        return {
            key: _local_tiles(piece, value) if isinstance(value, DTensor) and value.shape == alike else value
            for key, value in state.items()
        }

    def sum_over_processes(self, piece: "NeuronSlice", values: Tensor) -> Tensor:
        # Over the mesh dimensions that cut the parameter; along the others there are copies.
        parameter = piece.parameter
        for dimension, placement in enumerate(parameter.placements):
            if not isinstance(placement, Replicate):
                dist.all_reduce(values, group=parameter.device_mesh.get_group(dimension))
        return values


def _local_tiles(piece: "NeuronSlice", tensor: DTensor) -> list[Tile]:
    local = tensor.to_local().detach()
    local = local.view(local.shape[0], columns_of(tensor.shape)) if local.dim() == 1 else local
    shape = (tensor.shape[0], columns_of(tensor.shape))
    row_numbers, column_numbers = (_owned(tensor, dim, size) for dim, size in enumerate(shape))
    return [
        tile
        for row_begin, row, height in runs(row_numbers)
        for column_begin, column, width in runs(column_numbers)
        for tile in tiles_of_rectangle(
            piece, local[row_begin : row_begin + height, column_begin : column_begin + width], row, column
        )
    ]


def _owned(tensor: DTensor, dim: int, size: int) -> Tensor:
    """Which indices of one dimension this process holds. Asked of DTensor itself, by sharding a row of numbers in the
    same way (nothing is communicated), so that nested and strided shardings are right too."""
    numbers = torch.arange(size)
    placements = tuple(_moved(placement, dim) for placement in tensor.placements)
    if all(isinstance(placement, Replicate) for placement in placements):
        return numbers
    numbers = numbers.to(tensor.device_mesh.device_type)
    return distribute_tensor(numbers, tensor.device_mesh, placements, src_data_rank=None).to_local().cpu()


def _moved(placement, dim: int):
    """The placement of a one-dimensional tensor that is sharded as the tensor's dimension `dim` is."""
    if isinstance(placement, Replicate) or placement.dim != dim:
        return Replicate()
    split_factor = getattr(placement, "split_factor", None)
    return type(placement)(0) if split_factor is None else type(placement)(0, split_factor=split_factor)
