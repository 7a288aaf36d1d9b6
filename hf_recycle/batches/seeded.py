"""Any collator, its random numbers a pure function of seed, epoch and example."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_recycle.batches.clock import Moment, collating
from hf_recycle.batches.counter import example_keys
from hf_recycle.batches.example_draws import ExampleDraws
from hf_recycle.batches.numbered import Numbered
from hf_recycle.utils.random_state import OwnRandomState, generators_of, seed_of

logger = logging.get_logger(__name__)

EVALUATION_SEED = 20_231_215
"""Seed of the masks of every evaluation of every run, so that evaluation losses compare."""

_WORD = 0xFFFFFFFFFFFFFFFF


class SeededCollator:
    """Calls a collator as it is at that moment, with random numbers that depend on the seed and on which examples it
    is given, and on nothing else. Nothing outside is drawn from or advanced.

    What the collator draws through torch for the rows of the batch depends on each example alone (`ExampleDraws`): so
    it is with the stock collators for language modelling, whole words included, and most others. What it draws
    otherwise, from Python, numpy or a generator among its attributes, depends on the examples of the batch and their
    order. A generator that can't be reached causes one warning.

    Args:
        collator: called with the bare examples.
        seed: any integer; its low 64 bits count.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], seed: int) -> None:
        self.collator, self.seed = collator, seed
        self._checked = torch.zeros((), dtype=torch.bool).share_memory_()  # by the first of the data workers

    def __call__(self, numbered: Sequence[Numbered]) -> Any:
        if numbered[0].example is None:  # of a resumed stream: nothing was read, and the loader skips it
            return {"skipped": torch.zeros(len(numbered))}
        epochs = np.array([item.epoch & _WORD for item in numbered], dtype=np.uint64)
        numbers = np.array([item.number & _WORD for item in numbered], dtype=np.uint64)
        keys, examples = example_keys(self.seed, epochs, numbers), [item.example for item in numbered]
        moments = [item.moment for item in numbered]
        if not self._checked and getattr(get_worker_info(), "id", 0) == 0:
            self._checked.fill_(True)
            self._check(keys, examples, moments)
        return _collate(self.collator, keys, examples, moments)

    def _check(self, keys: np.ndarray, examples: list[Any], moments: list[Moment | None]) -> None:
        """Says so if the collator makes two batches of the same examples."""
        shared = {id(value): value for value in _attributes(self.collator) if isinstance(value, _HEAVY)}
        try:
            twin = copy.deepcopy(self.collator, shared)
            batches = [_collate(twin, keys, copy.deepcopy(examples), moments) for _ in range(2)]
            differs = not _same(*batches)
        except Exception:  # it can't be copied, or its batch not compared; what is wrong with it will show in its use
            return
        if differs:
            logger.warning(
                f"{_name(self.collator)} makes another batch of the same examples when it is called again: it draws "
                "from a random generator that can't be reached, or keeps count of its calls. A resumed run will get "
                "other masks than an uninterrupted one, and will not equal it to the bit."
            )


def _collate(
    collator: Callable[[list[Any]], Any], keys: np.ndarray, examples: list[Any], moments: list[Moment | None]
) -> Any:
    for inner in (collator, *_attributes(collator)):
        if getattr(inner, "seed", None) is not None and getattr(inner, "generator", 0) is None:
            make = getattr(inner, "create_rng", None)  # stock: made on first use, by which it would be too late
            if make is not None:
                make()
    own = OwnRandomState(seed_of("collator", keys.tobytes()), generators_of(collator), once=True)
    with own, _draws(collator, keys, examples), collating(moments):
        return collator(examples)


def _draws(collator: Any, keys: np.ndarray, examples: list[Any]) -> ExampleDraws:
    tokenizer = next((t for t in _attributes(collator) if isinstance(t, PreTrainedTokenizerBase)), None)
    if getattr(tokenizer, "padding_side", "right") != "left":
        return ExampleDraws(keys)
    try:
        rows = [example["input_ids"] if isinstance(example, Mapping) else example for example in examples]
        lengths = np.array([len(row) for row in rows])
    except (KeyError, TypeError):
        return ExampleDraws(keys)
    return ExampleDraws(keys, lambda width: width - lengths)


def _attributes(collator: Any) -> list[Any]:
    """The attributes of a collator, and of the one that it wraps."""
    own = list(getattr(collator, "__dict__", {}).values())
    inner = getattr(collator, "data_collator", None)  # of RemoveColumnsCollator
    return own if inner is None else [*own, *_attributes(inner)]


def _name(collator: Any) -> str:
    collator = getattr(collator, "data_collator", collator)
    return getattr(collator, "__name__", type(collator).__name__)


_HEAVY = (PreTrainedTokenizerBase, nn.Module)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return bool(np.array_equal(a, b))
