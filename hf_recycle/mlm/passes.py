"""Which pass over the data a sample belongs to, as a collator in any process knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

PASS_COLUMN = "hf_recycle_pass"
"""A sample that carries this key says itself which pass it belongs to. Collators take the key off."""

EVALUATION_SEED = 20_231_215
"""Seed of the masks of every evaluation of every run, so that evaluation losses compare."""


class PassCounter:
    """The number of the current pass over the data, kept in shared memory so that data workers that are
    already running see it change. A frozen counter stays at 0 and overrules what samples say."""

    def __init__(self, frozen: bool = False) -> None:
        self.frozen = frozen
        self._value = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy, and plain pickle, give the tensor ordinary memory.
        self.__dict__.update(state)
        self._value.share_memory_()

    def set(self, number: int) -> None:
        """Set the pass; on a frozen counter this does nothing."""
        if not self.frozen:
            self._value.fill_(number)

    def get(self) -> int:
        """The current pass."""
        return int(self._value.item())

    def split(self, examples: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        """Take `PASS_COLUMN` off the examples: `(examples without it, int64 (batch,) passes)`."""
        current = self.get()
        passes = np.full(len(examples), current, dtype=np.int64)
        rest = list(examples)
        for i, example in enumerate(examples):
            if isinstance(example, Mapping) and PASS_COLUMN in example:
                rest[i] = {name: value for name, value in example.items() if name != PASS_COLUMN}
                if not self.frozen:
                    passes[i] = int(example[PASS_COLUMN])
        return rest, passes
