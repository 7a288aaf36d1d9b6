"""Parameters cut into the parts that several processes have, and processes that are objects in one Python process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_recycle.neurons.blocks import NeuronSlice
from hf_recycle.neurons.storage.base import Storage
from hf_recycle.neurons.storage.tiles import Tile, runs, tiles_of_range, tiles_of_rectangle


@dataclass(frozen=True)
class Part:
    """What one process has of a parameter.

    Attributes:
        entries: int64 `(n,)`, numbers of the flattened parameter's entries, in the order in which they lie in memory.
        tiles: `tiles(piece, memory)`, where `memory` `(n,)` holds those entries.
    """

    entries: Tensor
    tiles: Callable[[NeuronSlice, Tensor], Iterator[Tile]]


def rows_and_columns(piece: NeuronSlice) -> tuple[int, int]:
    """Of the parameter as one matrix: the matrices of experts one behind the other, a bias as a column."""
    shape = piece.parameter.shape
    columns = 1 if piece.attribute == "bias" else shape[-1]
    return shape.numel() // columns, columns


def slice_of(
    shape: tuple[int, ...],
    dim: int,
    offset: int,
    length: int,
    dtype=torch.float64,
    stride: int = 1,
    expert: int | None = None,
) -> NeuronSlice:
    """A slice of a new random parameter: a matrix, or a bias; or one for each expert."""
    holder = nn.Module()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) + 0.1
    attribute = "weight" if len(shape) == (2 if expert is None else 3) else "bias"
    holder.register_parameter(attribute, nn.Parameter(values.to(dtype)))
    role = "in" if attribute == "weight" else "in.bias"
    return NeuronSlice(role, holder, attribute, dim, offset, length, stride, expert)


def places(piece: NeuronSlice) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(neuron, feature, index of the entry in the parameter), one by one."""
    before = () if piece.expert is None else (piece.expert,)
    for neuron in range(piece.length):
        line = piece.offset + neuron * piece.stride
        for feature in range(piece.width):
            after = (line,) if piece.attribute == "bias" else (line, feature) if piece.dim == 0 else (feature, line)
            yield neuron, feature, before + after


def lines_by_hand(piece: NeuronSlice, parameter: Tensor) -> Tensor:
    """`(d_ff, width)`, entry by entry."""
    lines = torch.empty(piece.length, piece.width, dtype=parameter.dtype)
    for neuron, feature, place in places(piece):
        lines[neuron, feature] = parameter[place]
    return lines


def range_part(columns: int, begin: int, end: int) -> Part:
    """As ZeRO cuts: a range of the flattened parameter."""
    return Part(torch.arange(begin, end), lambda piece, memory: tiles_of_range(piece, memory, begin, columns))


def grid_part(width: int, rows: Tensor, columns: Tensor) -> Part:
    """As DTensor cuts: some rows × some columns, which need not follow each other."""
    entries = (rows[:, None] * width + columns).flatten()

    def tiles(piece: NeuronSlice, memory: Tensor) -> Iterator[Tile]:
        local = memory.view(len(rows), len(columns))
        for i, row, height in runs(rows):
            for j, column, width in runs(columns):
                yield from tiles_of_rectangle(piece, local[i : i + height, j : j + width], row, column)

    return Part(entries, tiles)


@st.composite
def slices(draw, dtype=torch.float64) -> NeuronSlice:
    """Of a matrix or a bias, alone in its parameter or with others before, behind or between its lines; or of one
    expert's."""
    length, width = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    stride = draw(st.sampled_from([1, 1, 2]))
    offset, behind = draw(
        st.sampled_from([(0, 0), (length, 0), (0, length), (2, 1)] if stride == 1 else [(0, 0), (1, 0)])
    )
    lines = offset + length * stride + behind
    expert = draw(st.sampled_from([None, 0, 1, 2]))
    experts = () if expert is None else (3,)
    if draw(st.booleans()):
        dim = draw(st.sampled_from([0, 1]))
        shape = (lines, width) if dim == 0 else (width, lines)
        return slice_of(experts + shape, dim, offset, length, dtype, stride, expert)
    return slice_of((*experts, lines), 0, offset, length, dtype, stride, expert)


@st.composite
def partitions(draw, piece: NeuronSlice) -> list[Part]:
    """Among processes of which some may have nothing."""
    rows, columns = rows_and_columns(piece)
    how = draw(st.sampled_from(["ranges", "bands", "grid"]))
    if how == "ranges":
        cuts = sorted(draw(st.lists(st.integers(0, rows * columns), max_size=4)))
        return [range_part(columns, *bounds) for bounds in zip([0, *cuts], [*cuts, rows * columns], strict=True)]
    row_owners, column_owners = draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def owners(count: int, size: int) -> Tensor:
        owner = draw(st.lists(st.integers(0, count - 1), min_size=size, max_size=size))
        return torch.tensor(sorted(owner) if how == "bands" else owner)

    row_owner, column_owner = owners(row_owners, rows), owners(column_owners, columns)
    return [
        grid_part(columns, (row_owner == i).nonzero().flatten(), (column_owner == j).nonzero().flatten())
        for i in range(row_owners)
        for j in range(column_owners)
    ]


@st.composite
def cut_slices(draw, dtype=torch.float64) -> tuple[NeuronSlice, list[Part]]:
    piece = draw(slices(dtype))
    return piece, draw(partitions(piece))


def some_neurons(data: st.DataObject, piece: NeuronSlice) -> Tensor:
    """Distinct, in any order, maybe none, maybe all."""
    order = data.draw(st.permutations(range(piece.length)))
    return torch.tensor(order[: data.draw(st.integers(0, piece.length))], dtype=torch.int64)


# ---- Processes in lock step ----


class Process(Storage):
    """One of several processes. Its memory holds a part of the parameter, and of a gradient laid out like it."""

    def __init__(self, part: Part, parameter: Tensor, gradient: Tensor | None = None):
        self.part = part
        self.memory = parameter.detach().flatten()[part.entries].clone()
        self.gradient = None if gradient is None else gradient.flatten()[part.entries].clone()
        self.sums: list[Tensor] = []
        self.contributions: list[Tensor] = []

    def tiles(self, piece: NeuronSlice) -> list[Tile]:
        return list(self.part.tiles(piece, self.memory))

    def gradient_tiles(self, piece: NeuronSlice) -> list[Tile]:
        return [] if self.gradient is None else list(self.part.tiles(piece, self.gradient))

    def publish(self, piece: NeuronSlice, index: Tensor) -> None:
        pass

    def sum_over_processes(self, piece: NeuronSlice, values: Tensor) -> Tensor:
        self.contributions.append(values.clone())
        call = len(self.contributions) - 1
        return self.sums[call].clone() if call < len(self.sums) else values


def together(processes: list[Process], operation: Callable[[Process], object]) -> list:
    """What `operation` returns on each process, when each sum is that over all of them.

    The operation runs again and again, each time with one more sum known. It must not write before its last sum.
    """
    sums: list[Tensor] = []
    while True:
        results = []
        for process in processes:
            process.sums, process.contributions = sums, []
            results.append(operation(process))
        calls = {len(process.contributions) for process in processes}
        assert len(calls) == 1, "a process that takes no part in a sum would keep the others waiting forever"
        if len(sums) == calls.pop():
            return results
        sums = [*sums, sum(process.contributions[len(sums)] for process in processes)]


def assembled(processes: list[Process], like: Tensor, memory: str = "memory") -> Tensor:
    """The whole parameter, out of the processes' memories."""
    flat = torch.full((like.numel(),), float("nan"), dtype=like.dtype)
    for process in processes:
        flat[process.part.entries] = getattr(process, memory)
    return flat.view(like.shape)


def same_everywhere(results: list[Tensor]) -> Tensor:
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]
