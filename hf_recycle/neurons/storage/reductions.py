"""Norms and sums of the lines of a tile, read once and in the order in which they lie in memory."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce

import numpy as np
import torch
from torch import Tensor

from hf_recycle.neurons.storage.tiles import Tile

# Entries that are worked on at a time where an intermediate result is as large as they are: few enough that it stays in
# a CPU core's cache, and enough that an accelerator is not kept busy with starting kernels.
_ENTRIES_AT_ONCE = 1 << 18
_ENTRIES_AT_ONCE_ELSEWHERE = 1 << 22
# Numbers that are added one after the other; a longer sum would lose more than about the last digit of a float32.
_NUMBERS_IN_A_ROW = 1 << 10


def norms(tiles: Sequence[Tile], dtype: torch.dtype) -> list[Tensor]:
    """L2 norm of each neuron of some tiles, `(n,)` each, computed in `dtype`.

    Reading a tile drives everything else out of a CPU's caches, programs too. So tiles are read by one kernel after the
    other, with nothing between two of them but what has to be.
    """
    groups: dict[_Kernel, list[int]] = {}
    for number, tile in enumerate(tiles):
        groups.setdefault(_norm_kernel(tile, dtype), []).append(number)
    found: dict[int, Tensor] = {}
    for kernel, numbers in groups.items():
        found |= zip(numbers, kernel([tiles[number] for number in numbers], dtype), strict=True)
    return [found[number] for number in range(len(tiles))]


_Kernel = Callable[[Sequence[Tile], torch.dtype], list[Tensor]]


def _norm_kernel(tile: Tile, dtype: torch.dtype) -> _Kernel:
    if not tile.values.is_cpu:
        return _norms_across
    if tile.is_transposed:
        return _norms_down
    return _norms_by_dot_product if tile.values.dtype == dtype and torch.get_num_threads() == 1 else _norms_across


def _norms_across(tiles: Sequence[Tile], dtype: torch.dtype) -> list[Tensor]:
    return [_norms_of_lines(tile, dtype) for tile in tiles]


def _norms_of_lines(tile: Tile, dtype: torch.dtype) -> Tensor:
    values = tile.values
    if values.dtype == dtype:
        return torch.linalg.vector_norm(values, dim=1)
    if tile.is_transposed:
        return _added(chunk.to(dtype).square().sum(1) for chunk in bands(tile)).sqrt()
    # vector_norm upcasts the whole of its argument first.
    return torch.cat([torch.linalg.vector_norm(chunk, dim=1, dtype=dtype) for chunk in bands(tile)])


def _norms_by_dot_product(tiles: Sequence[Tile], dtype: torch.dtype) -> list[Tensor]:
    """On one thread BLAS is faster and more exact than `vector_norm`; NumPy's `vecdot` has no more than one."""
    lines = [tile.values.numpy() for tile in tiles]
    return _roots([torch.from_numpy(squares) for squares in [np.vecdot(each, each) for each in lines]])


def _norms_down(tiles: Sequence[Tile], dtype: torch.dtype) -> list[Tensor]:
    return _roots(_summed_down(tiles, dtype, squares=True))


def _roots(squares: list[Tensor]) -> list[Tensor]:
    return list(torch.cat(squares).sqrt_().split([len(each) for each in squares]))


def sums(tile: Tile) -> Tensor:
    """Sum over the features of each neuron, `(n,)`, in the tile's dtype or float32."""
    values, wide = tile.values, torch.promote_types(tile.values.dtype, torch.float32)
    if tile.is_transposed and values.is_cpu:
        return _summed_down([tile], wide, squares=False)[0]
    if values.dtype == wide:
        return values.sum(1)
    parts = (chunk.to(wide).sum(1) for chunk in bands(tile))
    return _added(parts) if tile.is_transposed else torch.cat(tuple(parts))


def _added(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def bands(tile: Tile) -> tuple[Tensor, ...]:
    """The values of a tile in bands that follow each other in memory: of neurons, or of features if transposed."""
    dim = int(tile.is_transposed)
    entries = _ENTRIES_AT_ONCE if tile.values.is_cpu else _ENTRIES_AT_ONCE_ELSEWHERE
    return tile.values.split(max(1, entries // max(tile.values.shape[1 - dim], 1)), dim)


def _summed_down(tiles: Sequence[Tile], dtype: torch.dtype, *, squares: bool) -> list[Tensor]:
    """Sum of the entries of each neuron, or of their squares, `(n,)`, of some transposed tiles on a CPU."""
    cut = [_cut(tile, dtype) for tile in tiles]
    parts = [[_sum_down(rows.to(dtype), squares) for rows in each] for each in cut]
    return [reduce(torch.add, sums) for sums in parts]


def _cut(tile: Tile, dtype: torch.dtype) -> list[Tensor]:
    """The values of a transposed tile as matrices `(k, n)` of few enough rows."""
    if tile.values.dtype != dtype:
        return [band.T for band in bands(tile)]
    if tile.values.shape[1] <= _NUMBERS_IN_A_ROW:
        return [tile.values.T]
    return [chunk.T for chunk in tile.values.split(_NUMBERS_IN_A_ROW, 1)]


def _sum_down(rows: Tensor, squares: bool) -> Tensor:
    """Sum of each column of `rows` `(k, n)`, or of the squares in it: `(n,)`.

    The reductions of PyTorch go down one column after the other on a CPU: three (`sum`) to twenty times (`vector_norm`)
    as long as reading. The gradients of a layer normalisation, Σ dy · (x − mean) / std for its scale and Σ dy for its
    shift, are such sums too, and their kernel goes along the rows.
    """
    mean, one, like = _no_normalisation(*rows.shape, rows.dtype)
    wanted = [False, squares, not squares]
    sums = torch.ops.aten.native_layer_norm_backward(rows, rows, like.shape, mean, one, like, like, wanted)
    return sums[1 if squares else 2]


@lru_cache(maxsize=8)
def _no_normalisation(count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 1 / std, `(count, 1)`, that change nothing, and a scale `(width,)` of which only the shape matters."""
    return torch.zeros(count, 1, dtype=dtype), torch.ones(count, 1, dtype=dtype), torch.empty(width, dtype=dtype)
