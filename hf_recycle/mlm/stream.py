"""A stream without length as one pass without end.

The stock Trainer can't resume a stream exactly in its second pass: it does not know where the first one
ended. In an endless stream there is only one pass to it, and skipping the batches already seen is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
from torch.utils.data import IterableDataset

from hf_recycle.mlm.passes import PASS_COLUMN


class EndlessStream(IterableDataset):
    """Pass 0, 1, 2, ... of `dataset`, one after another, each sample tagged with the number of its pass.

    Args:
        dataset: an iterable that can be iterated again and again and yields mappings: a
            `datasets.IterableDataset`, a torch one, or any other. Where it has `set_epoch(pass)`, that is
            called before each pass. How data workers share the samples is its own business (`datasets`
            gives each worker its shards).

    Every sample comes out as a new dict with `PASS_COLUMN` added. The stream ends only when a whole pass
    yields nothing, as for a data worker without a shard.

    Raises:
        TypeError: while iterating, on a sample that is not a mapping.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        super().__init__()
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        dataset = self.dataset
        if isinstance(dataset, datasets.IterableDataset):
            # Its epoch lies in memory shared by all data workers, each of which is in a pass of its own.
            dataset = copy.deepcopy(dataset)
        number, empty = 0, False
        while not empty:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(number)
            empty = True
            for sample in dataset:
                empty = False
                if not isinstance(sample, Mapping):
                    raise TypeError(
                        f"a streamed sample must be a mapping, such as {{'input_ids': [...]}}, and not a "
                        f"{type(sample).__name__}"
                    )
                yield {**sample, PASS_COLUMN: number}
            number += 1
