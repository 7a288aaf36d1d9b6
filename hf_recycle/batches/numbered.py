"""Datasets whose examples say which ones they are, so that a collator can give each random numbers of its own."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import datasets
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_recycle.batches.clock import Moment, TrainingClock
from hf_recycle.batches.stream_state import StreamState, can_resume
from hf_recycle.utils.random_state import OwnRandomState, generators_of, seed_of


class Numbered(NamedTuple):
    """An example, its epoch, its number (its index in a dataset, or its place in a stream), and when it is trained."""

    epoch: int
    number: int
    example: Any
    moment: Moment | None = None


class Placed(int):
    """An index of a dataset that knows its place in the order of the epoch."""

    place: int

    @classmethod
    def at(cls, index: int, place: int) -> Placed:
        placed = cls(index)
        placed.place = place
        return placed


class _Wrapper:
    """What a wrapper of a dataset does not do itself, the dataset does: callbacks find there what the user gave."""

    def __init__(self, dataset: Any, clock: TrainingClock, seed: int) -> None:
        vars(self).update(dataset=dataset, _clock=clock, _seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)

    def __reduce__(self):
        return type(self), (self.dataset, self._clock, self._seed)


class NumberedDataset(_Wrapper, Dataset):
    """The examples of a map-style dataset as `Numbered`.

    What the dataset draws while it loads a batch depends on the seed, the epoch and the batch, and on nothing else.
    """

    def __init__(self, dataset: Any, clock: TrainingClock, seed: int) -> None:
        super().__init__(dataset, clock, seed)
        vars(self).update(_draws=_may_draw(dataset))

    def __getitem__(self, index: Any) -> Numbered:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Numbered]:
        epoch, numbers = self._clock.epoch, [_number(index) for index in indices]
        moments = self._clock.moments([getattr(index, "place", None) for index in indices])
        indices = [int(index) if isinstance(index, Placed) else index for index in indices]
        if self._draws:
            seed = seed_of("dataset", self._seed, epoch, *numbers)
            with OwnRandomState(seed, generators_of(self.dataset), once=True):
                examples = load_examples(self.dataset, indices)
        else:
            examples = load_examples(self.dataset, indices)
        return [Numbered(epoch, *each) for each in zip(numbers, examples, moments, strict=True)]


class NumberedStream(_Wrapper, IterableDataset):
    """The examples of a stream as `Numbered`, by their places in it.

    A data worker counts what it reads itself, so there the numbers depend on how many workers there are. A stream that
    draws random numbers before its first example, as for another order, draws by epoch; if it does, all that it draws.
    """

    def __init__(self, dataset: Any, clock: TrainingClock, seed: int) -> None:
        super().__init__(dataset, clock, seed)
        vars(self).update(_state=None)

    def __iter__(self) -> Iterator[Numbered]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch = self._clock.epoch
        for place, example in self._examples(seed_of("stream", self._seed, epoch, first)):
            number = first + place * step
            yield Numbered(epoch, number, example, *self._clock.moments([number]))

    def _examples(self, seed: int) -> Iterator[tuple[int, Any]]:
        examples = iter(self._state.iterate() if self._state else enumerate(self.dataset))
        state = OwnRandomState(seed, generators_of(self.dataset))
        with state:
            begun = list(islice(examples, 1))
        yield from begun
        if not state.was_drawn_from():  # exchanging random states takes too long to do it for every stream
            yield from examples
            return
        while True:
            with state:
                following = list(islice(examples, 1))
            if not following:
                return
            yield from following

    def keep_state(self, every: int) -> StreamState | None:
        """Notes where the stream is after every so many examples, if that lets it resume exactly."""
        if can_resume(self.dataset):
            vars(self).update(_state=StreamState(self.dataset, every))
        return self._state


def _may_draw(dataset: Any) -> bool:
    """Whether a dataset may draw random numbers: not a list, nor a table without a transformation. Asked because it
    takes a fraction of a millisecond to exchange random states."""
    if isinstance(dataset, datasets.Dataset):
        return dataset.format["type"] == "custom"
    return type(dataset) is not list


def load_examples(dataset: Any, indices: Sequence[Any]) -> list[Any]:
    """The examples of a map-style dataset at some indices, all at once where it can."""
    several = getattr(dataset, "__getitems__", None)
    return several(indices) if several else [dataset[index] for index in indices]


def _number(index: Any) -> int:
    """A number for an index; samplers may give any key."""
    try:
        return operator.index(index)
    except TypeError:
        return int.from_bytes(hashlib.blake2b(repr(index).encode(), digest_size=8).digest(), "little")
