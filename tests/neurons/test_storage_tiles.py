"""Storage by tiles: several processes, each with a part of a parameter, do what one with the whole of it does.

The processes are objects in one Python process. Each has the part that ZeRO, FSDP2 or tensor parallelism would give it.
"""

import dataclasses

import pytest
import torch
from cut_parameters import (
    Process,
    assembled,
    cut_slices,
    lines_by_hand,
    places,
    same_everywhere,
    slice_of,
    some_neurons,
    together,
)
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.neurons.storage.plain import PlainStorage
from hf_recycle.neurons.storage.tiles import Tile, runs, tiles_of_range, tiles_of_rectangle

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
            assert tile.has_all_neurons is (len(tile.values) == piece.length)
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
    for _, _, place in places(piece):
        expected[place] = 7.0
    assert torch.equal(after, expected)


@given(st.data())
def test_rows_of_a_tile(data):
    tile = Tile(torch.zeros(data.draw(st.integers(1, 5)), 2), data.draw(st.integers(0, 4)), 1)
    index = data.draw(st.permutations(range(9)))[:5]
    held, rows = tile.rows(torch.tensor(index))
    holds = range(tile.neuron, tile.neuron + len(tile.values))
    assert torch.arange(5)[held].tolist() == [i for i, neuron in enumerate(index) if neuron in holds]
    assert rows.tolist() == [neuron - tile.neuron for neuron in index if neuron in holds]
    whole = Tile(torch.zeros(9, 2), 0, 1)
    for tile in (whole, dataclasses.replace(whole, has_all_neurons=True)):
        held, rows = tile.rows(torch.tensor(index))
        assert torch.arange(5)[held].tolist() == list(range(5))
        assert rows.tolist() == index


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
    joined = together(processes, lambda p: p.gather(piece, index, p.shard(piece, index, lines)))
    assert torch.equal(same_everywhere(joined), lines)
    assert torch.equal(assembled(processes, piece.parameter), before)
    cuts = [process.shard(piece, index, lines) for process in processes]
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
    """A run that is resumed in mid-fade-in goes on from whole lines of masters: to the bit."""
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
