"""A second pass over a training set, beside the main one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hf_recycle.methods.seeds import generator_for
from hf_recycle.mlm.passes import PASS_COLUMN


def mask_seed(seed: int) -> int:
    """The seed of the masks of a second pass, which are not those of the main one even where their seeds are equal."""
    return generator_for(seed, 0, 0, "overtrain masks").initial_seed()


class SecondPass:
    """An endless stream of a training set's samples in an order of its own, a new one in each pass.

    What comes is a pure function of (seed, position), so that a number is all it takes to go on where a run was
    interrupted, also with another number of processes.

    Args:
        dataset: a map-style dataset.
        collator: makes batches. Samples that are mappings carry the number of their pass under `PASS_COLUMN`, which
            the collators of this package take off.
        seed: seed of the order.

    Raises:
        ValueError: if the dataset is a stream or empty.
    """

    def __init__(self, dataset: Any, collator: Callable[[list[Any]], Any], seed: int):
        if isinstance(dataset, IterableDataset) or not has_length(dataset):
            raise ValueError(
                "overtrain_steps needs a training set with a length, which it reads a second time in another order, "
                f"and {type(dataset).__name__} is a stream: load the data without streaming."
            )
        if not len(dataset):
            raise ValueError("overtrain_steps needs a training set, and this one is empty.")
        self.dataset, self.collator, self.seed = dataset, collator, seed
        self._order: tuple[int, list[int]] | None = None

    def batch(self, position: int, size: int) -> Any:
        """Samples number `position` to `position + size` of the stream, collated, on the CPU."""
        places = [divmod(number, len(self.dataset)) for number in range(position, position + size)]
        indices = [self._index(*place) for place in places]
        several = getattr(self.dataset, "__getitems__", None)
        samples = several(indices) if several else [self.dataset[index] for index in indices]
        return self.collator(
            [
                {**sample, PASS_COLUMN: number} if isinstance(sample, Mapping) else sample
                for sample, (number, _) in zip(samples, places, strict=True)
            ]
        )

    def _index(self, number: int, place: int) -> int:
        if self._order is None or self._order[0] != number:
            generator = generator_for(self.seed, number, 0, "overtrain order")
            self._order = number, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[1][place]
