"""How many positions the head on masked positions computes, known without waiting for the device.

Which tokens are masked can be worked out on the device; how many, which is a shape, has to be known on the host. The
collator knows, so it says so in its batch. Compiled models, for which every new shape is a compilation, get the number
padded to one that is nearly always the same.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hf_recycle.mlm.loss import IGNORED

MASKED_TOKENS = "hf_recycle_masked_tokens"
"""The entry of a batch that says how many of its labels are not -100: a plain int, which no loader slices, joins or
moves to a device."""

_SMALLER = 0.8  # each size to that of the next larger one
_ABOVE, _BELOW = 4, 6  # standard deviations


class CountingCollator:
    """`collator`, with `MASKED_TOKENS` added to those of its batches that are mappings with a tensor of labels."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        if isinstance(batch, Mapping) and isinstance(labels := batch.get("labels"), Tensor):
            batch = {**batch, MASKED_TOKENS: int((labels != IGNORED).sum())}
        return batch


def static_size(masked: int, tokens: int, share: float | None) -> int:
    """A size for `masked` positions out of `tokens` that is the same for most batches of so many tokens.

    A function of its arguments alone, so that a resumed run computes with the shapes of the uninterrupted one.

    Args:
        masked: masked tokens of the batch, at most `tokens`.
        tokens: tokens of the batch, padding included.
        share: the chance of a token to be masked, where it is known.

    Returns:
        Between `masked` and `tokens`: four standard deviations above what `share` lets expect, a multiple of 8, if that
        is enough and not far too much (one batch in 30,000 is larger). Otherwise the smallest out of `tokens` · 0.8^k.
    """
    if share is not None and 0 <= share <= 1:
        mean, deviation = tokens * share, math.sqrt(tokens * share * (1 - share))
        usual = min(tokens, 8 * math.ceil((mean + _ABOVE * deviation) / 8))
        if min(_SMALLER * usual, mean - _BELOW * deviation) <= masked <= usual:
            return usual
    size = tokens
    while masked <= (smaller := math.ceil(_SMALLER * size)) < size:
        size = smaller
    return size
