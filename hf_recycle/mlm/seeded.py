"""Any collator, made reproducible."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.mlm.passes import EVALUATION_SEED, PassCounter


class SeededCollator:
    """Runs another collator under a random state of its own, seeded by (seed, pass, content of the batch).

    The same batch gives the same result in the same pass, in any process, and the global random state
    (shuffling, dropout) is left as it was. Unlike `MaskedLanguageModelingCollator` it can't give a sample
    the same mask in another batch: here **masks depend on the composition and the order of the batch**, so
    another batch size or number of processes gives other masks.

    Randomness is caught where it comes from Python's, numpy's or torch's global generators, or from the
    collator's attribute `generator` or `seed` as in the stock collators; nothing can be done about a
    generator hidden deeper.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], seed: int = 0) -> None:
        self.collator = collator
        self.seed = seed
        self._passes = PassCounter()

    @property
    def tokenizer(self) -> Any:
        """The collator's tokenizer. Raises AttributeError where it has none."""
        return self.collator.tokenizer

    @property
    def mlm_probability(self) -> float:
        """The collator's masking probability. Raises AttributeError where it has none."""
        return self.collator.mlm_probability

    def set_pass(self, number: int) -> None:
        """Say which pass over the data comes next; running data workers see it too."""
        self._passes.set(number)

    def for_evaluation(self) -> SeededCollator:
        """A copy whose randomness depends on the batch alone, the same in every pass and every run."""
        fixed = copy.copy(self)
        fixed.seed, fixed._passes = EVALUATION_SEED, PassCounter(frozen=True)
        return fixed

    def __call__(self, examples: Sequence[Any]) -> Any:
        """What the collator makes of the examples, `PASS_COLUMN` taken off."""
        examples, passes = self._passes.split(examples)
        seed = _batch_seed(self.seed, passes, examples)
        with _random_state(seed), _own_generator(self.collator, seed):
            return self.collator(examples)


def reproducible(collator: Callable[[list[Any]], Any], seed: int) -> Any:
    """A collator like `collator` whose output is a function of its seed, the pass and the data.

    One of ours is returned as it is. The stock `DataCollatorForLanguageModeling` that masks single tokens
    becomes a `MaskedLanguageModelingCollator` with the same settings, and its own seed if it has one.
    Everything else, subclasses and whole-word masking included, is wrapped in a `SeededCollator`.
    """
    if isinstance(collator, (MaskedLanguageModelingCollator, SeededCollator)):
        return collator
    if (
        type(collator) is DataCollatorForLanguageModeling
        and collator.mlm
        and not collator.whole_word_mask
        and collator.return_tensors == "pt"
    ):
        return MaskedLanguageModelingCollator(
            collator.tokenizer,
            mlm_probability=collator.mlm_probability,
            mask_replace_prob=collator.mask_replace_prob,
            random_replace_prob=collator.random_replace_prob,
            pad_to_multiple_of=collator.pad_to_multiple_of,
            seed=seed if collator.seed is None else collator.seed,
        )
    return SeededCollator(collator, seed)


def apart(collator: Callable[[list[Any]], Any], seed: int) -> Any:
    """A reproducible collator like `collator` with masks of its own: another seed, and passes of its own."""
    fresh = copy.copy(reproducible(collator, seed))
    fresh.seed, fresh._passes = seed, PassCounter()
    return fresh


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) global random states seeded, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        # Not torch.manual_seed: that would seed the accelerators as well, where dropout draws.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@contextmanager
def _own_generator(collator: Any, seed: int) -> Iterator[None]:
    """The collator's own generator, if it has or is about to make one, seeded, and put back afterwards."""
    before = getattr(collator, "generator", None)
    if isinstance(before, torch.Generator):
        state = before.get_state()
        before.manual_seed(seed)
        try:
            yield
        finally:
            before.set_state(state)
        return
    if isinstance(before, np.random.Generator):
        fresh = np.random.default_rng(seed)
    elif getattr(collator, "seed", None) is not None and hasattr(collator, "get_generator"):
        fresh = collator.get_generator(seed)  # stock: made on first use, from the seed and the data worker
    else:
        yield
        return
    collator.generator = fresh
    try:
        yield
    finally:
        collator.generator = before


def _batch_seed(seed: int, passes: np.ndarray, examples: Sequence[Any]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{seed}:".encode())
    _digest(digest, passes)
    for example in examples:
        identity = isinstance(example, Mapping) and "input_ids" in example
        _digest(digest, example["input_ids"] if identity else example)
    # 63 bits: torch takes a signed seed.
    return int.from_bytes(digest.digest(), "little") >> 1


def _digest(digest: Any, value: Any) -> None:
    """Feed numbers and strings, however nested, to the hash. Values of other kinds are passed over, for
    their bytes may differ between processes."""
    if isinstance(value, (str, bytes)):
        value = value.encode() if isinstance(value, str) else value
        digest.update(b"s%d:" % len(value) + value)
    elif isinstance(value, Mapping):
        digest.update(b"m%d:" % len(value))
        for name in sorted(value, key=str):
            _digest(digest, str(name))
            _digest(digest, value[name])
    elif (array := _numbers(value)) is not None:
        digest.update(b"a" + str((array.dtype.str, array.shape)).encode() + array.tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(b"l%d:" % len(value))
        for item in value:
            _digest(digest, item)


def _numbers(value: Any) -> np.ndarray | None:
    """`value` as an array if it is made of numbers. The same numbers in a list, an array or a tensor hash
    alike."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged, or a tensor numpy has no dtype for
        return None
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    return array.astype(np.float64) if array.dtype.kind == "f" else None
