"""Storage by tiles: several processes, each with a part of a parameter, do what one with the whole of it does.

The processes are objects in one Python process. Each has the part that ZeRO, FSDP2 or tensor parallelism would give it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_recycle.neurons.blocks import NeuronSlice
from hf_recycle.neurons.storage import base
from hf_recycle.neurons.storage.base import Storage
from hf_recycle.neurons.storage.plain import PlainStorage
from hf_recycle.neurons.storage.tiles import Tile, columns_of, runs, tiles_of_range, tiles_of_rectangle

# ---- A slice of a parameter, and ways to cut the parameter ----


@dataclass(frozen=True)
class Part:
    """What one process has of a parameter.

    Attributes:
        entries: int64 `(n,)`, numbers of the flattened parameter's entries, in the order in which they lie in memory.
        tiles: `tiles(piece, memory)`, where `memory` `(n,)` holds those entries.
    """

    entries: Tensor
    tiles: Callable[[NeuronSlice, Tensor], Iterator[Tile]]


def slice_of(shape: tuple[int, ...], dim: int, offset: int, length: int, dtype=torch.float64) -> NeuronSlice:
    """A slice of a new random parameter: a matrix, or a bias."""
    holder = nn.Module()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) + 0.1
    attribute = "weight" if len(shape) == 2 else "bias"
    holder.register_parameter(attribute, nn.Parameter(values.to(dtype)))
    return NeuronSlice("in", holder, attribute, dim, offset, length)


def lines_by_hand(piece: NeuronSlice, parameter: Tensor) -> Tensor:
    """`(d_ff, width)`, entry by entry."""
    lines = torch.empty(piece.length, piece.width, dtype=parameter.dtype)
    for neuron in range(piece.length):
        for feature in range(piece.width):
            place = (piece.offset + neuron, feature) if piece.dim == 0 else (feature, piece.offset + neuron)
            lines[neuron, feature] = parameter[place[: parameter.dim()]]
    return lines


def range_part(shape, begin: int, end: int) -> Part:
    """As ZeRO cuts: a range of the flattened parameter."""
    columns = columns_of(torch.Size(shape))
    return Part(torch.arange(begin, end), lambda piece, memory: tiles_of_range(piece, memory, begin, columns))


def grid_part(shape, rows: Tensor, columns: Tensor) -> Part:
    """As DTensor cuts: some rows × some columns, which need not follow each other."""
    entries = (rows[:, None] * columns_of(torch.Size(shape)) + columns).flatten()

    def tiles(piece: NeuronSlice, memory: Tensor) -> Iterator[Tile]:
        local = memory.view(len(rows), len(columns))
        for i, row, height in runs(rows):
            for j, column, width in runs(columns):
                yield from tiles_of_rectangle(piece, local[i : i + height, j : j + width], row, column)

    return Part(entries, tiles)


@st.composite
def slices(draw, dtype=torch.float64) -> NeuronSlice:
    """Of a matrix or a bias, alone in its parameter or with others before or behind it."""
    length, width = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    offset, behind = draw(st.sampled_from([(0, 0), (length, 0), (0, length), (2, 1)]))
    if draw(st.booleans()):
        dim = draw(st.sampled_from([0, 1]))
        shape = (offset + length + behind, width)
        return slice_of(shape if dim == 0 else shape[::-1], dim, offset, length, dtype)
    return slice_of((offset + length + behind,), 0, offset, length, dtype)


@st.composite
def partitions(draw, piece: NeuronSlice) -> list[Part]:
    """Among processes of which some may have nothing."""
    shape = tuple(piece.parameter.shape)
    rows, columns = shape[0], columns_of(piece.parameter.shape)
    how = draw(st.sampled_from(["ranges", "bands", "grid"]))
    if how == "ranges":
        cuts = sorted(draw(st.lists(st.integers(0, rows * columns), max_size=4)))
        return [range_part(shape, *bounds) for bounds in zip([0, *cuts], [*cuts, rows * columns], strict=True)]
    row_owners, column_owners = draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def owners(count: int, size: int) -> Tensor:
        owner = draw(st.lists(st.integers(0, count - 1), min_size=size, max_size=size))
        return torch.tensor(sorted(owner) if how == "bands" else owner)

    row_owner, column_owner = owners(row_owners, rows), owners(column_owners, columns)
    return [
        grid_part(shape, (row_owner == i).nonzero().flatten(), (column_owner == j).nonzero().flatten())
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


# ---- Tiles ----


@given(st.lists(st.integers(0, 6)))
def test_runs(numbers):
    """Maximal, one behind the other, and nothing left out."""
    found = list(runs(torch.tensor(numbers, dtype=torch.int64)))
    expected: list[list[int]] = []
    for position, number in enumerate(numbers):
        if position and number == numbers[position - 1] + 1:
            expected[-1][2] += 1
        else:
            expected.append([position, number, 1])
    assert [list(run) for run in found] == expected


@given(cut_slices())
def test_every_weight_of_the_slice_is_in_one_tile(cut):
    """And at its own place: the parameter's entries are their own numbers."""
    piece, parts = cut
    numbers = torch.arange(piece.parameter.numel())
    expected = lines_by_hand(piece, numbers.view(piece.parameter.shape))
    covered = torch.zeros(piece.length, piece.width, dtype=torch.int64)
    for part in parts:
        for tile in part.tiles(piece, numbers[part.entries]):
            assert tile.values.numel()
            assert torch.equal(tile.values, expected[tile.neurons, tile.features])
            covered[tile.neurons, tile.features] += 1
    assert torch.equal(covered, torch.ones_like(covered))


@given(cut_slices())
def test_a_tile_is_a_view(cut):
    """Writing to all tiles writes to all weights of the slice, in the processes' memories, and to no other."""
    piece, parts = cut
    processes = [Process(part, piece.parameter) for part in parts]
    for process in processes:
        for tile in process.tiles(piece):
            tile.values.fill_(7.0)
    after = assembled(processes, piece.parameter)
    assert (lines_by_hand(piece, after) == 7.0).all()
    expected = piece.parameter.detach().clone()
    expected.narrow(piece.dim, piece.offset, piece.length).fill_(7.0)
    assert torch.equal(after, expected)


@given(st.data())
def test_rows_of_a_tile(data):
    tile = Tile(torch.zeros(data.draw(st.integers(1, 5)), 2), data.draw(st.integers(0, 4)), 1)
    index = data.draw(st.permutations(range(9)))[:5]
    held, rows = tile.rows(torch.tensor(index))
    holds = range(tile.neuron, tile.neuron + len(tile.values))
    assert torch.arange(5)[held].tolist() == [i for i, neuron in enumerate(index) if neuron in holds]
    assert rows.tolist() == [neuron - tile.neuron for neuron in index if neuron in holds]


def test_a_range_that_begins_and_ends_in_mid_row():
    """Entries 5 to 17 of rows of 4: the end of row 1, rows 2 and 3, the beginning of row 4."""
    piece = slice_of((6, 4), 0, 0, 6)
    flat = torch.arange(5, 18)
    tiles = list(tiles_of_range(piece, flat, 5, 4))
    assert [(tile.neuron, tile.feature, tuple(tile.values.shape)) for tile in tiles] == [
        (1, 1, (1, 3)),
        (2, 0, (2, 4)),
        (4, 0, (1, 2)),
    ]
    assert torch.cat([tile.values.flatten() for tile in tiles]).tolist() == flat.tolist()
    by_columns = list(tiles_of_range(slice_of((6, 4), 1, 0, 4), flat, 5, 4))
    assert [(tile.neuron, tile.feature, tuple(tile.values.shape)) for tile in by_columns] == [
        (1, 1, (3, 1)),
        (0, 2, (4, 2)),
        (0, 4, (2, 1)),
    ]


def test_a_range_within_one_row():
    (tile,) = tiles_of_range(slice_of((6, 4), 0, 0, 6), torch.arange(9, 11), 9, 4)
    assert (tile.neuron, tile.feature, tile.values.tolist()) == (2, 1, [[9, 10]])


@pytest.mark.parametrize("dim", [0, 1])
def test_nothing_held_is_no_tile(dim):
    piece = slice_of((8, 8), dim, 4, 4)
    assert not list(tiles_of_range(piece, torch.empty(0), 13, 8))
    for shape in ((0, 8), (8, 0), (0, 0)):
        assert not list(tiles_of_rectangle(piece, torch.empty(shape), 0, 0))
    other_half = torch.zeros((4, 8) if dim == 0 else (8, 4))
    assert not list(tiles_of_rectangle(piece, other_half, 0, 0))


# ---- What is written once, over tiles ----


@given(cut_slices())
def test_norms(cut):
    piece, parts = cut
    processes = [Process(part, piece.parameter) for part in parts]
    found = same_everywhere(together(processes, lambda p: p.norms([piece], torch.float64)[0]))
    expected = PlainStorage().norms([piece], torch.float64)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    by_hand = lines_by_hand(piece, piece.parameter.detach()).square().sum(1).sqrt()
    torch.testing.assert_close(expected, by_hand, rtol=1e-12, atol=0)


@given(cut_slices())
def test_mean_std(cut):
    piece, parts = cut
    processes = [Process(part, piece.parameter) for part in parts]
    results = together(processes, lambda p: torch.stack(p.mean_std(piece)))
    lines = lines_by_hand(piece, piece.parameter.detach())
    std = lines.std() if lines.numel() > 1 else torch.zeros((), dtype=torch.float64)
    expected = torch.stack(PlainStorage().mean_std(piece))
    torch.testing.assert_close(same_everywhere(results), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(expected, torch.stack([lines.mean(), std]), rtol=1e-10, atol=1e-14)


@given(cut_slices(torch.bfloat16), st.data())
def test_read_full(cut, data):
    piece, parts = cut
    index = some_neurons(data, piece)
    processes = [Process(part, piece.parameter) for part in parts]
    found = same_everywhere(together(processes, lambda p: p.read_full(piece, index)))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, PlainStorage().read_full(piece, index))
    expected = lines_by_hand(piece, piece.parameter.detach())[index]
    assert torch.equal(found, expected.squeeze(1) if piece.is_bias else expected)


@given(cut_slices(torch.bfloat16), st.data())
def test_write_full(cut, data):
    """Of wider numbers; nothing but the lines written changes."""
    piece, parts = cut
    index = some_neurons(data, piece)
    lines = torch.randn((len(index),) if piece.is_bias else (len(index), piece.width))
    processes = [Process(part, piece.parameter) for part in parts]
    expected = lines_by_hand(piece, piece.parameter.detach())
    expected[index] = lines.bfloat16().reshape(len(index), piece.width)
    together(processes, lambda p: p.write_full(piece, index, lines))
    PlainStorage().write_full(piece, index, lines)
    after = assembled(processes, piece.parameter)
    assert torch.equal(after, piece.parameter)
    assert torch.equal(lines_by_hand(piece, after), expected)


@given(cut_slices(), st.data())
def test_cut_and_join(cut, data):
    """Any lines, cut and joined, are the same again; fragments are what a process would read of such lines."""
    piece, parts = cut
    index = some_neurons(data, piece)
    lines = torch.randn((len(index),) if piece.is_bias else (len(index), piece.width), dtype=torch.float64)
    processes = [Process(part, piece.parameter) for part in parts]
    before = assembled(processes, piece.parameter)
    joined = together(processes, lambda p: p.join(piece, index, p.cut(piece, index, lines)))
    assert torch.equal(same_everywhere(joined), lines)
    assert torch.equal(assembled(processes, piece.parameter), before)
    cuts = [process.cut(piece, index, lines) for process in processes]
    for process, fragments in zip(processes, cuts, strict=True):
        process.write(piece, index, fragments)
        assert all(torch.equal(a, b) for a, b in zip(process.read(piece, index), fragments, strict=True))


@given(cut_slices(), st.data())
def test_what_is_read_is_a_copy(cut, data):
    piece, parts = cut
    index = some_neurons(data, piece)
    processes = [Process(part, piece.parameter) for part in parts]
    for process in processes:
        for fragment in process.read(piece, index):
            fragment.fill_(0.0)
    together(processes, lambda p: p.read_full(piece, index).fill_(0.0))
    assert torch.equal(assembled(processes, piece.parameter), piece.parameter)


@given(cut_slices())
def test_scale(cut):
    piece, parts = cut
    factors = torch.randn(piece.length, dtype=torch.float64)
    expected = lines_by_hand(piece, piece.parameter.detach()) * factors[:, None]
    processes = [Process(part, piece.parameter) for part in parts]
    together(processes, lambda p: p.scale(piece, factors))
    PlainStorage().scale(piece, factors)
    after = assembled(processes, piece.parameter)
    assert torch.equal(after, piece.parameter)
    assert torch.equal(lines_by_hand(piece, after), expected)


@given(cut_slices(), st.data())
def test_scale_gradient(cut, data):
    piece, parts = cut
    index = some_neurons(data, piece)
    factors = torch.rand(len(index), dtype=torch.float64)
    piece.parameter.grad = torch.randn(piece.parameter.shape, dtype=torch.float64)
    processes = [Process(part, piece.parameter, piece.parameter.grad) for part in parts]
    expected = lines_by_hand(piece, piece.parameter.grad)
    expected[index] *= factors[:, None]
    together(processes, lambda p: p.scale_gradient(piece, index, factors))
    PlainStorage().scale_gradient(piece, index, factors)
    after = assembled(processes, piece.parameter, "gradient")
    assert torch.equal(after, piece.parameter.grad)
    assert torch.equal(lines_by_hand(piece, after), expected)
    assert torch.equal(assembled(processes, piece.parameter), piece.parameter)


@given(cut_slices(), st.data())
def test_fill_with_the_mean_of_the_others(cut, data):
    """What becomes of an optimizer's second moment."""
    piece, parts = cut
    index = some_neurons(data, piece)
    processes = [Process(part, piece.parameter) for part in parts]
    means = together(processes, lambda p: p.mean_of_others(piece, p.tiles(piece), index, piece.width))
    mean = same_everywhere(means)
    lines = lines_by_hand(piece, piece.parameter.detach())
    others = [i for i in range(piece.length) if i not in index.tolist()] or list(range(piece.length))
    torch.testing.assert_close(mean, lines[others].mean(), rtol=1e-10, atol=1e-14)
    plain = PlainStorage()
    tiles = plain.tiles(piece)
    torch.testing.assert_close(mean, plain.mean_of_others(piece, tiles, index, piece.width), rtol=1e-10, atol=1e-14)
    for value in (mean, 0.0):
        together(processes, lambda p, value=value: p.fill(p.tiles(piece), index, value))
        plain.fill(tiles, index, value)
        after = assembled(processes, piece.parameter)
        assert torch.equal(after, piece.parameter)
        lines[index] = value
        assert torch.equal(lines_by_hand(piece, after), lines)


# ---- Precision and memory ----


class Masters(Process):
    """Float32 masters beside a half-precision parameter."""

    separate_masters = True


@given(cut_slices(torch.bfloat16), st.data())
def test_masters_are_read_and_written_in_their_own_precision(cut, data):
    """A run that is resumed in mid-transition goes on from whole lines of masters: to the bit."""
    piece, parts = cut
    index = some_neurons(data, piece)
    masters = torch.randn(piece.parameter.shape)
    processes = [Masters(part, masters) for part in parts]
    lines = same_everywhere(together(processes, lambda p: p.read_full(piece, index)))
    expected = lines_by_hand(piece, masters)[index]
    assert torch.equal(lines.reshape(expected.shape), expected)
    changed = torch.randn(lines.shape)
    together(processes, lambda p: p.write_full(piece, index, changed))
    after = lines_by_hand(piece, assembled(processes, masters))[index]
    assert torch.equal(after, changed.reshape(after.shape))


@pytest.mark.parametrize("shape", [(5, 7), (1, 40), (40, 1), (3, 0)])
def test_norms_in_chunks(monkeypatch, shape):
    """Chunks are of whole lines, however long those are; the last is smaller; the result is that of one piece."""
    monkeypatch.setattr(base, "_ENTRIES_AT_ONCE", 16)
    chunks = []
    vector_norm = torch.linalg.vector_norm

    def spy(chunk, **arguments):
        chunks.append(chunk.numel())
        return vector_norm(chunk, **arguments)

    monkeypatch.setattr(torch.linalg, "vector_norm", spy)
    values = torch.randn(shape).bfloat16()
    found = base._norms(Tile(values, 0, 0), torch.float32)
    assert max(chunks) <= max(16, shape[1])
    assert sum(chunks) == values.numel()
    assert torch.equal(found, vector_norm(values.float(), dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 9)])
@pytest.mark.parametrize("transposed", [False, True])
def test_statistics_along_the_memory(monkeypatch, dtype, rows, transposed):
    """Norms, sums and moments of a tile, whichever way it lies in memory, in chunks of a few of its lines."""
    monkeypatch.setattr(base, "_ENTRIES_AT_ONCE", 30)
    memory = torch.randn((11, 13)[:: -1 if transposed else 1], dtype=torch.float64).to(dtype)
    tile = Tile((memory.T if transposed else memory)[rows], 0, 0)
    assert tile.is_transposed is transposed
    exact, wide = tile.values.double(), torch.promote_types(dtype, torch.float32)
    norms, sums = base._norms(tile, wide), base._sums(tile)
    assert norms.dtype == sums.dtype == wide
    torch.testing.assert_close(norms.double(), (exact**2).sum(1).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double(), exact.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_read_and_written_as_the_tile_lies_in_memory(transposed):
    values = torch.arange(20.0).view(4, 5).T if transposed else torch.arange(20.0).view(5, 4)
    tile, rows, before = Tile(values, 0, 0), torch.tensor([4, 0, 3]), values.clone()
    lines = tile.read(rows)
    assert torch.equal(lines, before[[4, 0, 3]])
    assert lines.T.is_contiguous() if transposed else lines.is_contiguous()
    lines += 100
    assert torch.equal(values, before)
    for new in (lines, lines.double().contiguous()):  # as it lies, and as it does not
        tile.write(rows, new)
        before[[4, 0, 3]] = new.float()
        assert torch.equal(values, before)
    for number in (2.0, torch.tensor(3.0)):
        tile.fill(rows, number)
        before[[4, 0, 3]] = number
        assert torch.equal(values, before)


def test_a_reborn_neuron_does_not_blur_the_mean_of_the_others():
    """Its second moment may be larger than theirs by orders of magnitude, or not finite."""
    piece, index = slice_of((6, 4), 0, 0, 6, torch.float32), torch.tensor([1, 4])
    storage = PlainStorage()
    for value in (1e30, float("inf"), float("nan")):
        with torch.no_grad():
            piece.parameter.fill_(1e-8)
            piece.parameter[index] = value
        mean = storage.mean_of_others(piece, storage.tiles(piece), index, piece.width)
        torch.testing.assert_close(mean, piece.parameter[0, 0].detach().double(), rtol=1e-6, atol=0)
