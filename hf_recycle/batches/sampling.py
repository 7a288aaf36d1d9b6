"""The order of the training examples in each epoch, as a pure function of seed and epoch."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Sampler

from hf_recycle.batches.clock import TrainingClock
from hf_recycle.batches.numbered import Placed
from hf_recycle.utils.random_state import OwnRandomState, generators_of, seed_of

_CHUNK = 512  # indices drawn at a time, because exchanging random states takes longer than drawing


class SeededSampler(Sampler):
    """Another sampler, which draws in each epoch as if its generators had just been seeded by the seed and the epoch.

    A sampler whose generator goes on through all epochs, the global one or its own, can't be resumed in a later epoch:
    what it drew before is not known there.
    """

    def __init__(self, sampler: Any, clock: TrainingClock, seed: int) -> None:
        self.sampler, self._clock, self._seed = sampler, clock, seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __iter__(self) -> Iterator[Any]:
        state = OwnRandomState(seed_of("sampler", self._seed, self._clock.epoch), generators_of(self.sampler))
        with state:
            indices = enumerate(self.sampler)
        while True:
            with state:
                chunk = list(islice(indices, _CHUNK))
            if not chunk:
                return
            for place, index in chunk:
                yield Placed.at(index, place) if type(index) is int else index
