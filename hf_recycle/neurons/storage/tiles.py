"""Tiles: what one process holds of the lines of a `NeuronSlice`.

A slice is a matrix of `d_ff` lines × `width` features, whatever the parameter's own layout. A process holds some
rectangles of it: the whole, a band of neurons, a band of features, or the pieces that a range of the flattened
parameter cuts out. All the work of the storage classes is to say which; everything else is written once, over tiles.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_recycle.neurons.blocks import NeuronSlice


@dataclass(frozen=True)
class Tile:
    """A rectangle of lines, in this process' memory.

    Attributes:
        values: `(neurons, features)`, a view: writing to it writes to the parameter.
        neuron: the number of the first neuron.
        feature: the number of the first feature.
    """

    values: Tensor
    neuron: int
    feature: int

    @property
    def neurons(self) -> slice:
        return slice(self.neuron, self.neuron + self.values.shape[0])

    @property
    def features(self) -> slice:
        return slice(self.feature, self.feature + self.values.shape[1])

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the neurons `index` `(n,)` the tile holds, bool `(n,)`, and in which of its rows, int64 `(k,)`."""
        local = index - self.neuron
        held = (local >= 0) & (local < self.values.shape[0])
        return held.to(self.values.device), local[held].to(self.values.device)


def tiles_of_rectangle(piece: "NeuronSlice", values: Tensor, row: int, column: int) -> Iterator[Tile]:
    """The tile that a rectangle of a slice's parameter holds, if any.

    Args:
        values: `(rows, columns)` of the parameter (a bias: `(rows, 1)`), a view.
        row, column: where it begins in the parameter.
    """
    if piece.dim == 1:
        values, row, column = values.T, column, row
    # A fused matrix holds two slices one behind the other.
    first, last = max(row, piece.offset), min(row + values.shape[0], piece.offset + piece.length)
    if first < last and values.shape[1]:
        yield Tile(values[first - row : last - row], first - piece.offset, column)


def tiles_of_range(piece: "NeuronSlice", flat: Tensor, start: int, columns: int) -> Iterator[Tile]:
    """The tiles that a range of the flattened parameter holds: the end of a row, whole rows, the beginning of a row.

    Args:
        flat: `(n,)`, a view: entries `start` to `start + n` of the flattened parameter.
        columns: length of the parameter's rows (a bias: 1).
    """
    position, end = start, start + len(flat)
    while position < end:
        row, column = divmod(position, columns)
        whole_rows = 0 if column else (end - position) // columns
        size = whole_rows * columns if whole_rows else min(columns - column, end - position)
        rectangle = flat[position - start : position - start + size].view(max(whole_rows, 1), -1)
        yield from tiles_of_rectangle(piece, rectangle, row, column)
        position += size


def runs(numbers: Tensor) -> Iterator[tuple[int, int, int]]:
    """Cuts ascending-by-one runs out of `numbers` `(n,)`: (where the run begins in `numbers`, its first number, its
    length)."""
    if not len(numbers):
        return
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(numbers)]
    for begin, end in itertools.pairwise(bounds):
        yield begin, int(numbers[begin]), end - begin


def columns_of(shape: torch.Size) -> int:
    """Length of a parameter's rows; a bias is a column of rows of one."""
    return shape[1] if len(shape) == 2 else 1
