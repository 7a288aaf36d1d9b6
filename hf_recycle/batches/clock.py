"""When an example is trained: at which optimizer step, known in the data worker that reads it, however far ahead."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch


class Moment(NamedTuple):
    """An optimizer step, from 0, and how many the training has."""

    step: int
    of: int


class TrainingClock:
    """Epoch and steps in shared memory: data workers that run already see them change.

    When an example is trained follows from its place in the order of the epoch, so nothing has to be saved, and a
    resumed run finds the moments of an uninterrupted one.
    """

    def __init__(self) -> None:
        self._values = torch.zeros(4, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._values.share_memory_()  # plain pickle gives the tensor ordinary memory

    @property
    def epoch(self) -> int:
        return int(self._values[0])

    def set_training(self, steps: int, examples_per_step: int) -> None:
        """Tells how long the training is, and how many examples of all processes a step takes."""
        self._values[2:] = torch.tensor([steps, examples_per_step])

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Tells which epoch comes, and the optimizer steps before its first example."""
        self._values[:2] = torch.tensor([epoch, first_step])

    def moments(self, places: Sequence[int | None]) -> list[Moment | None]:
        """When the examples at places of the epoch's order are trained; None for those that are not, and of which
        nobody can tell."""
        _, first_step, steps, examples_per_step = self._values.tolist()
        if not examples_per_step:
            return [None] * len(places)
        return [
            None if place is None else Moment(min(first_step + place // examples_per_step, steps), steps)
            for place in places
        ]


_collated: ContextVar[list[Moment | None] | None] = ContextVar("moments of the examples of a batch", default=None)


@contextmanager
def collating(moments: list[Moment | None]) -> Iterator[None]:
    """Within the context, `moments_of_batch` tells these."""
    token = _collated.set(moments)
    try:
        yield
    finally:
        _collated.reset(token)


def moments_of_batch() -> tuple[np.ndarray, int] | None:
    """For a collator that a `RecyclingTrainer` calls: when the examples of its batch are trained, int64 `(batch,)`, and
    the steps of the training. None in an evaluation, and wherever that is not known."""
    found = _collated.get() or []
    moments = [moment for moment in found if moment is not None]
    if not moments or len(moments) < len(found):
        return None
    return np.array([moment.step for moment in moments], np.int64), moments[0].of
