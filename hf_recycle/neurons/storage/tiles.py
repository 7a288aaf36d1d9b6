"""Tiles: what one process holds of the lines of a `ParameterSlice`.

A slice is a matrix of `d_ff` lines × `width` features, whatever the parameter's own layout. A process holds some
rectangles of it: the whole, a band of neurons, a band of features, or the pieces that a range of the flattened
parameter cuts out. All the work of the storage classes is to say which; everything else is written once, over tiles.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_recycle.neurons.slices import ParameterSlice


@dataclass(frozen=True)
class Tile:
    """A rectangle of lines, in this process' memory.

    Attributes:
        values: `(neurons, features)`, a view: writing to it writes to the parameter.
        neuron: the number of the first neuron.
        feature: the number of the first feature.
        has_all_neurons: whether it certainly has a row of each line of the slice.
    """

    values: Tensor
    neuron: int
    feature: int
    has_all_neurons: bool = False

    @property
    def neurons(self) -> slice:
        return slice(self.neuron, self.neuron + self.values.shape[0])

    @property
    def features(self) -> slice:
        return slice(self.feature, self.feature + self.values.shape[1])

    def rows(self, index: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Where in `index` `(n,)`, on the CPU, the neurons stand that the tile holds, int64 `(k,)` (a full slice if it
        holds them all), and in which of its rows they are, int64 `(k,)`, both on the tile's device.

        Remembered as long as `index` lives, which must not be edited: the neurons that fade in are looked up at every
        step.
        """
        if self.has_all_neurons and self.values.is_cpu:
            return slice(None), index
        places = _places.setdefault(index, {})
        key = self.neuron, len(self.values), self.values.device
        if key not in places:
            local = index - self.neuron
            held = ((local >= 0) & (local < len(self.values))).nonzero().flatten()
            rows = to_device(local[held], key[2])
            places[key] = (slice(None) if len(held) == len(index) else to_device(held, key[2])), rows
        return places[key]

    def read(self, rows: Tensor, into: Tensor | None = None) -> Tensor:
        """Copies of some rows, int64 `(k,)`, laid out in memory as the tile is: `(k, features)`.

        Args:
            into: `(k, features)` of the tile's dtype, no longer needed: is overwritten and returned if it is laid out
                so, which saves asking the system for memory at every step.
        """
        if self.is_transposed:
            # As index_select does, but on several threads.
            memory = self.values.T
            out = into.T if into is not None and into.T.is_contiguous() else None
            return torch.gather(memory, 1, rows.expand(len(memory), len(rows)), out=out).T
        out = into if into is not None and into.is_contiguous() else None
        return torch.index_select(self.values, 0, rows, out=out)

    def write(self, rows: Tensor, lines: Tensor) -> None:
        """Overwrites some rows, int64 `(k,)`, with `lines` `(k, features)`, cast to the tile's dtype."""
        lines = to_device(lines.to(self.values.dtype), self.values.device)
        if self.is_transposed:
            self.values.T.index_copy_(1, rows, lines.T.contiguous())
        else:
            self.values.index_copy_(0, rows, lines)

    def scale(self, rows: Tensor, factors: Tensor) -> None:
        """Multiplies some rows, int64 `(k,)`, by `factors` `(k,)`, rounded to the tile's dtype once."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        factors = to_device(factors, self.values.device).to(wide)
        if self.is_transposed and self.values.dtype == wide and len(rows) * MANY > len(self.values):
            # Times one changes no bit of the others.
            factors = factors.new_ones(len(self.values)).index_copy_(0, rows, factors)
            self.values.mul_(factors.unsqueeze(1))
        else:
            self.write(rows, self.read(rows).mul_(factors.unsqueeze(1)))

    def fill(self, rows: Tensor, value: Tensor | float) -> None:
        """Sets some rows, int64 `(k,)`, to one number."""
        memory, dim = (self.values.T, 1) if self.is_transposed else (self.values, 0)
        memory.index_fill_(dim, rows, value)

    @property
    def is_transposed(self) -> bool:
        """Whether features, and not neurons, lie one behind the other in memory. Working against that is several times
        slower on a CPU."""
        return self.values.stride(0) < self.values.stride(1)


_places = WeakTensorKeyDictionary()

# From one column in so many on, working on all of them is faster than reading these and writing them back, because
# memory comes in lines of 16 numbers.
MANY = 64


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on a device; to an accelerator without waiting for what it has still to do."""
    return values.to(device, non_blocking=device.type != "cpu")


def tiles_of_rectangle(piece: ParameterSlice, values: Tensor, row: int, column: int) -> Iterator[Tile]:
    """The tile that a rectangle of a slice's parameter holds, if any.

    Args:
        values: `(rows, columns)` of the parameter (a bias: `(rows, 1)`; the matrices of several experts: one behind the
            other), a view.
        row, column: where it begins in the parameter.
    """
    if piece.expert is not None:
        first_row = piece.first_row
        begin, end = max(row, first_row), min(row + values.shape[0], first_row + piece.matrix_shape[0])
        if begin >= end:
            return
        values, row = values[begin - row : end - row], begin - first_row
    if piece.dim == 1:
        values, row, column = values.T, column, row
    # A fused matrix holds two slices, one behind the other or interleaved.
    first = max(0, -((piece.offset - row) // piece.stride))
    last = min(piece.length, -((piece.offset - row - values.shape[0]) // piece.stride))
    if first < last and values.shape[1]:
        start, stop = (piece.offset + neuron * piece.stride - row for neuron in (first, last - 1))
        yield Tile(values[start : stop + 1 : piece.stride], first, column, last - first == piece.length)


def tiles_of_range(piece: ParameterSlice, flat: Tensor, start: int, columns: int) -> Iterator[Tile]:
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
