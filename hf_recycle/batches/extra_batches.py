"""Extra batches of a training set, beside those of the main run."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hf_recycle.batches.numbered import Numbered, load_examples
from hf_recycle.batches.seeded import SeededCollator
from hf_recycle.utils.seeds import generator_for


class ExtraBatches:
    """An endless stream of a training set's samples in an order of its own, a new one in each epoch.

    What comes is a pure function of (seed, position), so that a number is all it takes to go on where a run was
    interrupted, also with another number of processes. The masks are not those of the main pass, even where their
    seeds are equal.

    Args:
        dataset: a map-style dataset.
        collator: makes batches of its samples.
        seed: seed of the order and the masks.
        wanted_by: the argument that asks for it, for messages.

    Raises:
        ValueError: if the dataset is a stream or empty.
    """

    def __init__(
        self, dataset: Any, collator: Callable[[list[Any]], Any], seed: int, wanted_by: str = "overtrain_steps"
    ):
        if isinstance(dataset, IterableDataset) or not has_length(dataset):
            raise ValueError(
                f"{wanted_by} needs a training set with a length, which it reads a second time in another order, "
                f"and {type(dataset).__name__} is a stream: load the data without streaming."
            )
        if not len(dataset):
            raise ValueError(f"{wanted_by} needs a training set, and this one is empty.")
        self.dataset: Any = dataset
        self.seed = seed
        self.collator = SeededCollator(collator, generator_for(seed, 0, 0, "overtrain masks").initial_seed())
        self._order: tuple[int, list[int]] | None = None

    def batch(self, position: int, size: int) -> Any:
        """Samples number `position` to `position + size` of the stream, collated, on the CPU."""
        places = [divmod(number, len(self.dataset)) for number in range(position, position + size)]
        indices = [self._index(*place) for place in places]
        samples = load_examples(self.dataset, indices)
        return self.collator(
            [Numbered(epoch, index, sample) for (epoch, _), index, sample in zip(places, indices, samples, strict=True)]
        )

    def _index(self, epoch: int, place: int) -> int:
        if self._order is None or self._order[0] != epoch:
            generator = generator_for(self.seed, epoch, 0, "overtrain order")
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[1][place]
