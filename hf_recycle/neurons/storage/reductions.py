"""Norms and sums of the lines of a tile, read once and in the order in which they lie in memory."""

from functools import reduce

import torch
from torch import Tensor

from hf_recycle.neurons.storage.tiles import Tile

# Entries that are worked on at a time where an intermediate result is as large as they are: few enough that it stays in
# a CPU core's cache, and enough that an accelerator is not kept busy with starting kernels.
_ENTRIES_AT_ONCE = 1 << 18
_ENTRIES_AT_ONCE_ELSEWHERE = 1 << 22
# Numbers that are added one after the other; a longer sum would lose more than about the last digit of a float32.
_NUMBERS_IN_A_ROW = 1 << 10


def norms(tile: Tile, dtype: torch.dtype) -> Tensor:
    """L2 norm of each neuron, `(n,)`, computed in `dtype`."""
    values = tile.values
    if not tile.is_transposed:
        if values.dtype == dtype:
            return torch.linalg.vector_norm(values, dim=1)
        # vector_norm upcasts the whole of its argument first.
        return torch.cat([torch.linalg.vector_norm(chunk, dim=1, dtype=dtype) for chunk in bands(tile)])
    if values.is_cpu:
        return _summed_down(tile, dtype, squares=True).sqrt()
    if values.dtype == dtype:
        return torch.linalg.vector_norm(values, dim=1)
    return sum(chunk.to(dtype).square().sum(1) for chunk in bands(tile)).sqrt()


def sums(tile: Tile) -> Tensor:
    """Sum over the features of each neuron, `(n,)`, in the tile's dtype or float32."""
    values, wide = tile.values, torch.promote_types(tile.values.dtype, torch.float32)
    if tile.is_transposed and values.is_cpu:
        return _summed_down(tile, wide, squares=False)
    if values.dtype == wide:
        return values.sum(1)
    parts = [chunk.to(wide).sum(1) for chunk in bands(tile)]
    return sum(parts) if tile.is_transposed else torch.cat(parts)


def bands(tile: Tile) -> tuple[Tensor, ...]:
    """The values of a tile in bands that follow each other in memory: of neurons, or of features if transposed."""
    dim = int(tile.is_transposed)
    entries = _ENTRIES_AT_ONCE if tile.values.is_cpu else _ENTRIES_AT_ONCE_ELSEWHERE
    return tile.values.split(max(1, entries // max(tile.values.shape[1 - dim], 1)), dim)


def _summed_down(tile: Tile, dtype: torch.dtype, *, squares: bool) -> Tensor:
    """Sum of the entries of each neuron, or of their squares, `(n,)`, of a transposed tile on a CPU."""
    chunks = tile.values.split(_NUMBERS_IN_A_ROW, 1) if tile.values.dtype == dtype else bands(tile)
    return reduce(torch.add, (_sum_down(chunk.T.to(dtype), squares) for chunk in chunks))


def _sum_down(rows: Tensor, squares: bool) -> Tensor:
    """Sum of each column of `rows` `(k, n)`, or of the squares in it: `(n,)`.

    The reductions of PyTorch go down one column after the other on a CPU: three (`sum`) to twenty times (`vector_norm`)
    as long as reading. The gradients of a layer normalisation, Σ dy · (x − mean) / std for its scale and Σ dy for its
    shift, are such sums too, and their kernel goes along the rows.
    """
    count, width = rows.shape
    mean, one, like = rows.new_zeros(count, 1), rows.new_ones(count, 1), rows.new_empty(width)
    wanted = [False, squares, not squares]
    return torch.ops.aten.native_layer_norm_backward(rows, rows, [width], mean, one, like, like, wanted)[1 + wanted[2]]
