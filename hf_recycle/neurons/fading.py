"""Neurons on their way from old to new weights: where both are kept.

Each process keeps only what its tiles hold of them. In a checkpoint they are whole lines, the same for every engine and
number of processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.storage import Fragments
from hf_recycle.neurons.storage.tiles import to_device


@dataclass
class FadeIn:
    """Some neurons of one block fading in.

    Attributes:
        index: int64 `(n,)`.
        age: int64 `(n,)`, optimizer steps since the phase.
        old, new: the weights before and after, by role, as fragments; as whole lines `(n, width)` (biases `(n,)`)
            while `whole`.
        whole: just loaded from a checkpoint, and not yet cut to what this process holds.
    """

    index: Tensor
    age: Tensor
    old: dict[str, Any]
    new: dict[str, Any]
    whole: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def merged_with(self, other: "FadeIn") -> "FadeIn":
        def join(first: dict[str, Fragments], second: dict[str, Fragments]) -> dict[str, Fragments]:
            return {
                role: [torch.cat(pair) for pair in zip(fragments, second[role], strict=True)]
                for role, fragments in first.items()
            }

        index, age = torch.cat([self.index, other.index]), torch.cat([self.age, other.age])
        return FadeIn(index, age, join(self.old, other.old), join(self.new, other.new))

    def only(self, block: FeedForward, keep: Tensor) -> "FadeIn | None":
        """The neurons for which `keep`, bool `(n,)`, is true; None if there are none."""
        if not keep.any():
            return None

        def pick(sides: dict[str, Fragments]) -> dict[str, Fragments]:
            return {
                role: [values[rows] for values, rows in zip(fragments, self.held(block[role], keep), strict=True)]
                for role, fragments in sides.items()
            }

        return FadeIn(self.index[keep], self.age[keep], pick(self.old), pick(self.new))

    def held(self, piece: NeuronSlice, values: Tensor) -> Fragments:
        """What belongs to the rows of each fragment out of `values` `(n,)`, one for each neuron."""
        if not piece.storage.sharded:
            return [to_device(values, piece.device)]
        tiles = piece.storage.tiles(piece)
        return [to_device(values, tile.values.device)[tile.rows(self.index)[0]] for tile in tiles]

    def shard(self, block: FeedForward) -> "FadeIn":
        """A just loaded fade-in, cut to what this process holds."""

        def shard(lines: dict[str, Tensor]) -> dict[str, Fragments]:
            return {piece.role: piece.storage.shard(piece, self.index, lines[piece.role]) for piece in block.slices}

        return FadeIn(self.index, self.age, shard(self.old), shard(self.new)) if self.whole else self

    def lines(self, block: FeedForward) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Old and new weights as whole lines, `{role: (n, width)}` (biases `(n,)`), on every process."""
        if self.whole:
            return self.old, self.new

        def join(fragments: dict[str, Fragments]) -> dict[str, Tensor]:
            return {
                piece.role: piece.storage.gather(piece, self.index, fragments[piece.role]) for piece in block.slices
            }

        return join(self.old), join(self.new)
