"""Tiles and how they lie in memory: in chunks, along it or across it, with numbers that drown others."""

import math

import pytest
import torch
from cut_parameters import slice_of
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.neurons.storage import reductions
from hf_recycle.neurons.storage.plain import PlainStorage
from hf_recycle.neurons.storage.tiles import Tile


@pytest.mark.parametrize("shape", [(5, 7), (1, 40), (40, 1), (3, 0)])
def test_norms_in_chunks(monkeypatch, shape):
    """Chunks are of whole lines, however long those are; the last is smaller; the result is that of one piece."""
    monkeypatch.setattr(reductions, "_ENTRIES_AT_ONCE", 16)
    chunks = []
    vector_norm = torch.linalg.vector_norm

    def spy(chunk, **arguments):
        chunks.append(chunk.numel())
        return vector_norm(chunk, **arguments)

    monkeypatch.setattr(torch.linalg, "vector_norm", spy)
    values = torch.randn(shape).bfloat16()
    found = reductions.norms([Tile(values, 0, 0)], torch.float32)[0]
    assert max(chunks) <= max(16, shape[1])
    assert sum(chunks) == values.numel()
    assert torch.equal(found, vector_norm(values.float(), dim=1))


@given(st.data())
def test_statistics_along_the_memory(data):
    """Norms and sums of a tile that lies in memory this way or that, whole or a part of its parameter, in chunks of a
    few of its lines, against loops over its neurons. What is not finite stays with its neuron."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    transposed = data.draw(st.booleans()) and min(shape) > 1
    memory = torch.randn(shape[::-1] if transposed else shape, dtype=torch.float64).to(dtype)
    first, feature = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    values = (memory.T if transposed else memory)[first:, feature:]
    broken = data.draw(st.integers(0, len(values) - 1))
    values[broken, 0] = data.draw(st.sampled_from([1.0, 1e30, float("inf"), float("nan")]))
    tile, wide = Tile(values, 0, 0), torch.promote_types(dtype, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "_ENTRIES_AT_ONCE", data.draw(st.integers(1, 90)))
        patch.setattr(reductions, "_NUMBERS_IN_A_ROW", data.draw(st.integers(1, 10)))
        [norms], sums = reductions.norms([tile], torch.float64), reductions.sums(tile)
    assert norms.dtype == torch.float64
    assert sums.dtype == wide
    for neuron, line in enumerate(values.double().tolist()):
        norm = torch.tensor(math.sqrt(math.fsum(weight * weight for weight in line)), dtype=torch.float64)
        torch.testing.assert_close(norms[neuron], norm, rtol=1e-12, atol=0, equal_nan=True)
        total = torch.tensor(sum(line), dtype=torch.float64)
        torch.testing.assert_close(sums[neuron].double(), total, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_norms_of_tiles_that_lie_in_memory_in_different_ways(threads):
    """Each kernel takes those of its kind, and all come back in the order in which they were asked for."""
    shapes = [(5, 7), (3, 0), (1, 40), (6, 1), (4, 3000)]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    values = [each for matrix in values for each in (matrix, matrix.T.contiguous().T)]
    found = reductions.norms([Tile(each, 0, 0) for each in values], torch.float32)
    for norms, each in zip(found, values, strict=True):
        torch.testing.assert_close(norms.double(), each.double().norm(dim=1), rtol=3e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 1 << 17), (3, 1000), (4096, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_long_sums_keep_the_digits_of_float32(shape, transposed, threads):
    """Also where all the numbers have one sign, which is where one sum after the other would lose digits."""
    values = torch.rand(shape) + 0.5
    values = values.T.contiguous().T if transposed else values
    tile, exact = Tile(values, 0, 0), values.double()
    assert tile.is_transposed is transposed
    [norms] = reductions.norms([tile], torch.float32)
    torch.testing.assert_close(norms.double(), exact.norm(dim=1), rtol=3e-6, atol=0)
    torch.testing.assert_close(reductions.sums(tile).double(), exact.sum(1), rtol=3e-6, atol=0)


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


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_read_into_memory_that_is_no_longer_needed(transposed):
    """If it is laid out as the tile is; else new memory is taken."""
    values = torch.arange(20.0).view(4, 5).T if transposed else torch.arange(20.0).view(5, 4)
    tile, rows = Tile(values, 0, 0), torch.tensor([4, 0, 3])
    spent = tile.read(rows)
    values += 100
    lines = tile.read(rows, into=spent)
    assert lines.data_ptr() == spent.data_ptr()
    assert torch.equal(lines, values[[4, 0, 3]])
    otherwise = torch.zeros(3, 4) if transposed else torch.zeros(4, 3).T
    lines = tile.read(rows, into=otherwise)
    assert torch.equal(lines, values[[4, 0, 3]])
    assert lines.stride() == spent.stride()
    assert not otherwise.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 4, 70, 200])
@pytest.mark.parametrize("transposed", [False, True])
def test_scaling_rows_changes_no_bit_of_the_others(transposed, count, dtype):
    """Few rows or many, of 200; also where the others are no numbers, infinite, denormal or a negative zero."""
    values = torch.randn(200, 6, generator=torch.Generator().manual_seed(count)).to(dtype)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).smallest_normal / 8])
    values[:, :5] = torch.where(torch.arange(200).unsqueeze(1) % 2 == 0, odd.to(dtype), values[:, :5])
    values = values.T.contiguous().T if transposed else values
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:count]
    factors = torch.rand(count, dtype=torch.float64)
    expected = values.clone()
    for row, factor in zip(rows, factors, strict=True):
        wide = torch.promote_types(dtype, torch.float32)
        expected[row] = (values[row].to(wide) * factor.to(wide)).to(dtype)
    Tile(values, 0, 0).scale(rows, factors)
    as_bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    others = torch.ones(200, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(values[others].view(as_bits), expected[others].view(as_bits))
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "length"), [(0, 200), (70, 270)])  # the whole parameter, and a part of one
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("dim", [0, 1, None])  # rows, columns, a bias
def test_lines_are_written_by_number(dim, count, offset, length, dtype, threads):
    """Few lines and many, which are written in different ways."""
    shape = (length,) if dim is None else (length, 7) if dim == 0 else (7, length)
    piece = slice_of(shape, dim or 0, offset, 200, dtype)
    expected, index = piece.parameter.detach().clone(), torch.arange(2, 200, 4)[:count]
    lines = torch.randn((count,) if dim is None else (count, 7), dtype=torch.float64)
    PlainStorage().write_full(piece, index, lines)
    for number, line in zip(index.tolist(), lines, strict=True):
        expected.select(dim or 0, offset + number).copy_(line)
    assert torch.equal(piece.parameter, expected)
