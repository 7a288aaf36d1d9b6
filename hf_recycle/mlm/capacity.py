"""How many positions the head on masked positions computes, known without waiting for the device.

Which tokens are masked can be worked out on the device; how many, which is a shape, has to be known on the host. The
collator knows, so it says so in its batch. Compiled models, for which every new shape is a compilation, get the number
padded to one that is nearly always the same; where the chance of a token to be masked is not known, dynamic shapes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hf_recycle.mlm.loss import IGNORED

MASKED_TOKENS = "hf_recycle_masked_tokens"
"""The entry of a batch that says how many of its labels are not -100: a plain int, which no loader slices, joins or
moves to a device."""


class CountingCollator:
    """`collator`, with `MASKED_TOKENS` added to those of its batches that are mappings with a tensor of labels."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        if isinstance(batch, Mapping) and isinstance(labels := batch.get("labels"), Tensor):
            batch = {**batch, MASKED_TOKENS: int((labels != IGNORED).sum())}
        return batch


def usual_size(masked: int, tokens: int, share: float) -> int | None:
    """A size for `masked` positions out of `tokens` that is the same for nearly all batches of so many tokens.

    A function of its arguments alone, so that a resumed run computes with the shapes of the uninterrupted one.

    Args:
        masked: masked tokens of the batch.
        tokens: tokens of the batch, padding included.
        share: the chance of a token to be masked.

    Returns:
        Four standard deviations above the mean, rounded up to a multiple of 8. None if that is too small (one batch in
        30,000), or far larger than needed (much padding).
    """
    mean, deviation = tokens * share, math.sqrt(tokens * share * (1 - share))
    usual = 8 * math.ceil((mean + 4 * deviation) / 8)
    enough = min(0.8 * usual, mean - 6 * deviation)
    return usual if enough <= masked <= usual else None
