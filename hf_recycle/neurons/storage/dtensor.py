"""Parameters that are DTensors: FSDP2 (`fully_shard`), tensor parallelism, or both."""

from collections.abc import Hashable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from hf_recycle.neurons.slices import ParameterSlice
from hf_recycle.neurons.storage.base import Storage
from hf_recycle.neurons.storage.tiles import Tile, runs, tiles_of_rectangle


class DTensorStorage(Storage):
    """The tiles are what `to_local()` holds; it is edited in place, because DTensor refuses indexed assignment."""

    def tiles(self, piece: ParameterSlice) -> list[Tile]:
        return _local_tiles(piece, _parameter(piece))

    def gradient_tiles(self, piece: ParameterSlice) -> list[Tile]:
        gradient = piece.parameter.grad
        return [] if gradient is None else _local_tiles(piece, cast(DTensor, gradient))

    def optimizer_state(self, optimizer, piece: ParameterSlice) -> dict[str, list[Tile] | Tensor]:
        state = optimizer.state.get(piece.parameter, {})
        alike = piece.parameter.shape
        return {
            key: _local_tiles(piece, value) if isinstance(value, DTensor) and value.shape == alike else value
            for key, value in state.items()
        }

    def sum_over_processes(self, piece: ParameterSlice, values: Tensor) -> Tensor:
        # Over the mesh dimensions that cut the parameter; along the others there are copies.
        parameter = _parameter(piece)
        for dimension, placement in enumerate(parameter.placements):
            if not isinstance(placement, Replicate):
                dist.all_reduce(values, group=parameter.device_mesh.get_group(dimension))
        return values

    def processes(self, piece: ParameterSlice) -> Hashable:
        parameter = _parameter(piece)
        return parameter.device_mesh, tuple(isinstance(placement, Replicate) for placement in parameter.placements)


def _parameter(piece: ParameterSlice) -> DTensor:
    return cast(DTensor, piece.parameter)


def _local_tiles(piece: ParameterSlice, tensor: DTensor) -> list[Tile]:
    local = tensor.to_local().detach()
    # Rows are counted through the matrices of all experts; a bias is a column.
    split = tensor.dim() if piece.is_bias else min(1 if piece.expert is None else 2, tensor.dim())
    row_numbers, column_numbers = _flat(tensor, range(split)), _flat(tensor, range(split, tensor.dim()))
    if local.shape != (len(row_numbers), len(column_numbers)):
        local = local.view(len(row_numbers), len(column_numbers))
    return [
        tile
        for row_begin, row, height in runs(row_numbers)
        for column_begin, column, width in runs(column_numbers)
        for tile in tiles_of_rectangle(
            piece, local[row_begin : row_begin + height, column_begin : column_begin + width], row, column
        )
    ]


def _flat(tensor: DTensor, dims: range) -> Tensor:
    """Which indices this process holds of some dimensions flattened into one, int64 `(n,)` on the CPU."""
    numbers = torch.zeros(1, dtype=torch.int64)
    for dim in dims:
        size = tensor.shape[dim]
        numbers = (numbers.unsqueeze(1) * size + _owned(tensor, dim, size)).flatten()
    return numbers


def _owned(tensor: DTensor, dim: int, size: int) -> Tensor:
    """Which indices of one dimension this process holds, int64 `(n,)` on the CPU."""
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this process does not take part in the parameter's mesh"
    numbers = torch.arange(size)
    for mesh_dim in _order_of_cuts(tensor, dim):
        chunks = numbers.chunk(mesh.size(mesh_dim))
        # More processes than indices: the last ones hold none.
        numbers = chunks[coordinate[mesh_dim]] if coordinate[mesh_dim] < len(chunks) else numbers[:0]
    return numbers


def _order_of_cuts(tensor: DTensor, dim: int) -> list[int]:
    """The mesh dimensions that cut one dimension of a tensor, in the order in which they cut.

    Usually that is their own order. A strided sharding (FSDP2 of what tensor parallelism has cut already) comes after
    mesh dimensions to its right; `split_factor` is the number of parts that those have made. DTensor's own way to shard
    a tensor like that holds for even sizes only.
    """
    order: list[int] = []
    for mesh_dim, placement in reversed(list(enumerate(tensor.placements))):
        if getattr(placement, "dim", None) != dim:  # a Replicate has none
            continue
        parts, position = getattr(placement, "split_factor", 1), 0
        while parts > 1 and position < len(order):
            parts //= tensor.device_mesh.size(order[position])
            position += 1
        order.insert(position, mesh_dim)
    return order
