"""What can be done with the lines of a slice, however they are stored."""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from hf_recycle.neurons.slices import ParameterSlice
from hf_recycle.neurons.storage import reductions
from hf_recycle.neurons.storage.tiles import Tile, to_device

Fragments = list[Tensor]
"""What this process holds of some lines: for each of its tiles, the rows of those lines that lie in it."""


class Storage:
    """Operations on the lines of one `ParameterSlice`, written over its tiles.

    Two copies of a weight are told apart. The *master* is what the optimizer updates; the *forward* copy is what the
    model computes with. For most engines they are one and the same memory; DeepSpeed keeps both.

    Methods with "full" in their name take or give whole lines `(n, width)` (a bias: `(n,)`), the same on every
    process; fragments stay where they are. Communication: `norms` and `mean_std` O(d_ff), `read_full` O(n · width), the
    others none.
    """

    separate_masters = False
    sharded = True

    # ---- What a storage class has to say ----

    def tiles(self, piece: ParameterSlice) -> list[Tile]:
        """This process' tiles of the master weights."""
        raise NotImplementedError

    def gradient_tiles(self, piece: ParameterSlice) -> list[Tile]:
        """The same of the gradient; none if there is no gradient."""
        raise NotImplementedError

    def optimizer_state(
        self, optimizer: torch.optim.Optimizer, piece: ParameterSlice
    ) -> dict[str, list[Tile] | Tensor]:
        """What the optimizer keeps for the parameter: entries laid out like it as tiles, others as they are."""
        raise NotImplementedError

    def sum_over_processes(self, piece: ParameterSlice, values: Tensor) -> Tensor:
        """Sum of `values` over the processes that hold the other tiles."""
        raise NotImplementedError

    def processes(self, piece: ParameterSlice) -> Hashable:
        """What two slices have in common if `sum_over_processes` of the one is that of the other."""
        return None

    def publish(self, piece: ParameterSlice, index: Tensor) -> None:
        """Brings the forward copy of lines `index` `(n,)` up to date with the master."""

    def write_forward(self, piece: ParameterSlice, index: Tensor, fragments: Fragments) -> None:
        """Overwrites the forward copy of lines `index` `(n,)`; where masters are separate, those stay."""
        self.write(piece, index, fragments)

    def read_forward(self, piece: ParameterSlice, index: Tensor) -> Fragments:
        """The forward copy of lines `index` `(n,)`, cut like the master's tiles."""
        return self.read(piece, index)

    def group_of(self, piece: ParameterSlice, optimizer) -> int:
        """Number of the parameter group of the optimizer (wrapped as it may be) that the parameter belongs to; -1 for
        none (a frozen one)."""
        parameter = piece.parameter
        for number, group in enumerate(optimizer.param_groups):
            if any(other is parameter for other in group["params"]):
                return number
        return -1

    def stepped(self, piece: ParameterSlice, optimizer) -> Tensor:
        """The tensor that the optimizer has in its groups for the parameter; with separate masters, it steps many
        parameters as one."""
        return piece.parameter

    # ---- Written once ----

    def norms(self, pieces: Sequence[ParameterSlice], dtype: torch.dtype) -> list[Tensor]:
        """L2 norm of every line of some slices of equal length on the same `processes`, computed in `dtype`: `(d_ff,)`
        each. One sum over processes for all of them."""
        if not self.sharded:
            tiles = [tile for piece in pieces for tile in self.tiles(piece)]
            return reductions.norms(tiles, dtype)
        squares = torch.zeros(len(pieces), pieces[0].length, dtype=dtype, device=pieces[0].device)
        held = [(row, tile) for row, piece in zip(squares, pieces, strict=True) for tile in self.tiles(piece)]
        for (row, tile), norms in zip(held, reductions.norms([tile for _, tile in held], dtype), strict=True):
            row[tile.neurons] += norms.square()
        return list(self.sum_over_processes(pieces[0], squares).sqrt())

    def mean_std(self, piece: ParameterSlice) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over all the lines, as scalars in float64."""
        count = piece.length * piece.width
        chunks = [chunk for tile in self.tiles(piece) for chunk in reductions.bands(tile)]
        mean = self._sum(piece, (chunk.double().sum() for chunk in chunks)) / count
        # Deviations in the weights' own precision or float32; only their sum needs more.
        wide = torch.promote_types(piece.dtype, torch.float32)
        deviations = ((chunk.to(wide) - mean.to(chunk.device)).square() for chunk in chunks)
        square = self._sum(piece, (each.double().sum() for each in deviations))
        return mean, (square / max(count - 1, 1)).sqrt()

    def _sum(self, piece: ParameterSlice, parts: Iterable[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=piece.device)
        for part in parts:
            total += part
        return self.sum_over_processes(piece, total)

    def read(self, piece: ParameterSlice, index: Tensor, into: Fragments | None = None) -> Fragments:
        """Copies of what this process holds of lines `index` `(n,)`; where possible in the memory of `into`, fragments
        of the same lines that are no longer needed."""
        tiles = self.tiles(piece)
        pairs = zip(tiles, [None] * len(tiles) if into is None else into, strict=True)
        return [tile.read(tile.rows(index)[1], spent) for tile, spent in pairs]

    def write(self, piece: ParameterSlice, index: Tensor, fragments: Fragments) -> None:
        """Overwrites what this process holds of lines `index` `(n,)`, cast to the parameter's dtype."""
        for tile, values in zip(self.tiles(piece), fragments, strict=True):
            tile.write(tile.rows(index)[1], values)

    def shard(self, piece: ParameterSlice, index: Tensor, lines: Tensor) -> Fragments:
        """The fragments of whole lines `(n, width)`."""
        parts = ((tile, self._part(piece, tile, index, lines)[1]) for tile in self.tiles(piece))
        return [part.to(tile.values.dtype, copy=True) for tile, part in parts]

    def _part(self, piece: ParameterSlice, tile: Tile, index: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of a tile lines `index` `(n,)` are, and what of `lines` `(n, width)` (a bias: `(n,)`) belongs in
        them; a view if that is all."""
        held, rows = tile.rows(index)
        return rows, to_device(lines, tile.values.device).reshape(index.shape[0], piece.width)[held, tile.features]

    def gather(self, piece: ParameterSlice, index: Tensor, fragments: Fragments) -> Tensor:
        """The whole lines `(n, width)` (a bias: `(n,)`) of fragments, on every process."""
        # Masters are float32 whatever the parameter is, also for a process that holds none of them.
        dtype = torch.promote_types(piece.dtype, torch.float32) if self.separate_masters else piece.dtype
        lines = torch.zeros(len(index), piece.width, dtype=dtype, device=piece.device)
        for tile, values in zip(self.tiles(piece), fragments, strict=True):
            lines[tile.rows(index)[0], tile.features] = values.to(lines)
        lines = self.sum_over_processes(piece, lines)
        return lines.squeeze(1) if piece.is_bias else lines

    def read_full(self, piece: ParameterSlice, index: Tensor) -> Tensor:
        """A copy of lines `index` `(n,)`: `(n, width)` (a bias: `(n,)`)."""
        return self.gather(piece, index, self.read(piece, index))

    def write_full(self, piece: ParameterSlice, index: Tensor, lines: Tensor) -> None:
        """Overwrites lines `index` `(n,)`, master and forward copy, with `lines` `(n, width)` (a bias: `(n,)`)."""
        for tile in self.tiles(piece):
            rows, part = self._part(piece, tile, index, lines)
            tile.write(rows, part)
        self.publish(piece, index)

    def clear(self, piece: ParameterSlice, index: Tensor) -> None:
        """Sets lines `index` `(n,)` to zero, master and forward copy."""
        self.fill(self.tiles(piece), index, 0.0)

    def scale(self, piece: ParameterSlice, factors: Tensor) -> None:
        """Multiplies every line by its factor, `factors` `(d_ff,)`, master and forward copy."""
        for tile in self.tiles(piece):
            tile.values.mul_(factors[tile.neurons].to(tile.values).unsqueeze(1))

    def scale_gradient(self, piece: ParameterSlice, index: Tensor, factors: Tensor) -> None:
        """Multiplies the gradient of lines `index` `(n,)`, if there is one, by `factors` `(n,)`, in place."""
        for tile in self.gradient_tiles(piece):
            held, rows = tile.rows(index)
            tile.scale(rows, to_device(factors, tile.values.device)[held])

    def fill(self, tiles: list[Tile], index: Tensor, value: Tensor | float) -> None:
        """Sets lines `index` `(n,)` of some tiles to one number."""
        for tile in tiles:
            tile.fill(tile.rows(index)[1], value if isinstance(value, float) else value.to(tile.values))

    def mean_of_others(self, piece: ParameterSlice, tiles: list[Tile], index: Tensor, width: int) -> Tensor:
        """Mean over the entries (`width` for each neuron) of the neurons not in `index` `(n,)`, all different; over all
        entries if there are no others."""
        if index.shape[0] == piece.length:
            index = index[:0]
        # Summed by neuron first: subtracting those of `index` from the sum of all would lose the others behind them.
        sums = (reductions.sums(tile).index_fill_(0, tile.rows(index)[1], 0).double().sum() for tile in tiles)
        return self._sum(piece, sums) / ((piece.length - index.shape[0]) * width)
