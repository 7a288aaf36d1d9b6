"""How many positions the head on masked positions computes, known without waiting for the device.

Which tokens are masked can be worked out on the device; how many, which is a shape, has to be known on the host. On an
accelerator the collator counts, and the count goes with the batch, beside its tensors. Compiled models, for which every
new shape is a compilation, get the number padded to one that is nearly always the same; where the chance of a token to
be masked is not known, dynamic shapes.
"""

import math
from collections.abc import Callable
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor
from transformers import BatchEncoding

from hf_recycle.internals.of_torch import version_of
from hf_recycle.mlm.loss import IGNORED


class CountingCollator:
    """`collator`, whose batches know how many of their labels are not -100 (see `counted`)."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        return counted(self.collator(examples))


def counted(batch: Any) -> Any:
    """`batch` as it is, but that `masked_tokens` knows the count of its labels once `batch.to(device)` has moved them,
    which is what every loader does. Batches of other types than dict and BatchEncoding, or without labels, are left
    alone."""
    if type(batch) not in (dict, BatchEncoding) or not isinstance(labels := batch.get("labels"), Tensor):
        return batch
    copy = _CountedDict(batch) if type(batch) is dict else _CountedEncoding(batch.data, batch.encodings)
    copy.masked_tokens = int((labels != IGNORED).sum())
    return copy


def masked_tokens(labels: Tensor) -> int:
    """How many of `labels` are not -100. Waits for the device where nobody counted them before they were moved to it,
    or where they were changed since."""
    count, version = getattr(labels, "masked_tokens", (0, None))
    return count if version == version_of(labels) else int((labels != IGNORED).sum())


def _note_count(labels: Tensor, count: int | None) -> None:
    if count is not None:
        labels.masked_tokens = count, version_of(labels)  # type: ignore[attr-defined]


class _CountedDict(dict):
    """A count outside of the mapping: whoever goes through a batch finds tensors only. What joins or slices batches
    makes new ones, which have no count."""

    masked_tokens: int | None = None

    def to(self, device: Any, non_blocking: bool = False) -> dict[str, Any]:
        moved = send_to_device(dict(self), device, non_blocking=non_blocking)
        _note_count(moved["labels"], self.masked_tokens)
        return moved


class _CountedEncoding(BatchEncoding):
    masked_tokens: int | None = None

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        super().to(device, non_blocking=non_blocking)
        _note_count(self["labels"], self.masked_tokens)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"masked_tokens": self.masked_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.masked_tokens = state.pop("masked_tokens")
        super().__setstate__(state)


def padded_count(masked: int, tokens: int, share: float) -> int | None:
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
