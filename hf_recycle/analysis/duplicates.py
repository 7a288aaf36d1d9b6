"""Neurons that compute nearly what another neuron of their block computes.

The *direction* of a neuron is its in-row (gate and up rows one behind the other) and its out-column, each scaled to
length one, concatenated. The cosine of two directions is so the mean of the cosines of in-rows and of out-columns, and
scaling one up and the other down, which changes nothing for ReLU, does not change it. Neuron i is a *duplicate* if an
earlier neuron j < i has a direction with a cosine of at least `threshold`. Biases are left out; a neuron whose in-row
or out-column is zero has no direction and duplicates no other.
"""

import torch
from torch import Tensor

from hf_recycle.analysis.scan import Scan, Tiles
from hf_recycle.neurons.blocks import FeedForward

_NEIGHBOURS = 8  # nearest earlier neurons in the sketch that are compared exactly
_ROWS = 64  # neurons compared with all others at a time
_ENTRIES = 1 << 20  # weights of each side of the pairs that are compared exactly at a time
_ROUNDING = 1e-6  # of the cosine of two equal float32 neurons
# A pair at the threshold looks more than 2 times as far in the sketch once in exp(64 (1 - ln 2)) = 3 · 10^8 draws.
_SLACK = 2.0


def duplicates(block: FeedForward, tiles: Tiles, scanned: Scan, threshold: float = 0.99) -> Tensor:
    """Indices of the duplicates of a block, int64, ascending.

    Candidates are looked for in the sketch, then compared exactly in a second pass over the weights, which is spared if
    there are none. Memory: O(64 · d_ff).
    """
    pairs = _candidates(scanned, threshold)
    if not len(pairs):
        return torch.zeros(0, dtype=torch.int64)
    close = _cosines(block, tiles, scanned, pairs) >= threshold - _ROUNDING
    return pairs[close, 0].unique()


def _candidates(scanned: Scan, threshold: float) -> Tensor:
    """Pairs (i, j < i) that may have a cosine of `threshold`, int64 `(n, 2)`."""
    sketch, alive = scanned.sketch, scanned.has_direction
    lengths = sketch.square().sum(1)
    # Rounding of float32 must not hide equal neurons when the threshold is 1.
    limit = _SLACK * 2 * (1 - threshold) + 1e-4
    columns = torch.arange(len(sketch))
    found = []
    # One buffer for all: large ones that come and go leave holes which the allocator does not give back.
    buffer = torch.empty(_ROWS, len(sketch))
    for rows in columns.split(_ROWS):
        distances = torch.addmm(lengths, sketch[rows], sketch.T, alpha=-2, out=buffer[: len(rows)])
        distances.add_(lengths[rows].unsqueeze(1))
        distances.masked_fill_(columns >= rows.unsqueeze(1), torch.inf)
        distances.masked_fill_(~alive, torch.inf).masked_fill_(~alive[rows].unsqueeze(1), torch.inf)
        nearest = distances.topk(min(_NEIGHBOURS, len(sketch)), largest=False)
        close = nearest.values <= limit
        found.append(torch.stack([rows.unsqueeze(1).expand_as(close)[close], nearest.indices[close]], dim=1))
    return torch.cat(found)


def _cosines(block: FeedForward, tiles: Tiles, scanned: Scan, pairs: Tensor) -> Tensor:
    """Cosine of the directions of each pair, float64 `(n,)`."""
    widest = max(piece.width for piece in block.slices)
    return torch.cat(
        [_cosines_at_once(block, tiles, scanned, part) for part in pairs.split(max(1, _ENTRIES // widest))]
    )


def _cosines_at_once(block: FeedForward, tiles: Tiles, scanned: Scan, pairs: Tensor) -> Tensor:
    neurons, places = pairs.unique(return_inverse=True)
    products = {side: torch.zeros(len(pairs), dtype=torch.float64) for side in ("in", "out")}
    for piece in (*block.in_slices, block.out_slice):
        lines = torch.empty(len(neurons), piece.width)
        for tile in tiles(piece):
            held, rows = tile.rows(neurons)
            lines[held, tile.features] = tile.values[rows].float()
        side = products["out" if piece.role == "out" else "in"]
        side += (lines[places[:, 0]] * lines[places[:, 1]]).sum(1, dtype=torch.float64)
    first, second = pairs.T
    in_norms = scanned.in_norm[first] * scanned.in_norm[second]
    out_norms = scanned.out_norm[first] * scanned.out_norm[second]
    return (products["in"] / in_norms + products["out"] / out_norms) / 2
