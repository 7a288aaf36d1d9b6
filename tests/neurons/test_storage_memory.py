"""Tiles and how they lie in memory: in chunks, along it or across it, with numbers that drown others."""

import pytest
import torch
from cut_parameters import slice_of

from hf_recycle.neurons.storage import base
from hf_recycle.neurons.storage.plain import PlainStorage
from hf_recycle.neurons.storage.tiles import Tile


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
