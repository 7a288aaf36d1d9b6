"""Random states: one's own for a while, and everything back as it was afterwards."""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class OwnRandomState:
    """A context in which Python's, numpy's and torch's (CPU) global generators, and those in `generators`, begin at
    `seed`; when it is entered again, they go on where they were when it was left. Outside, nothing has changed.

    Args:
        once: it is not entered again, which saves a third of its time.
    """

    def __init__(self, seed: int, generators: Iterable[Any] = (), *, once: bool = False) -> None:
        # The default generator, not torch.manual_seed, which seeds the accelerators as well, where dropout draws.
        self._sources = [random, np.random, torch.default_generator, *generators]
        self._seed, self._once = seed, once
        self._inside: list[Any] | None = None
        self._outside: list[Any] = []

    def __enter__(self) -> None:
        self._outside = self._states()
        if self._inside is None:
            for place, source in enumerate(self._sources):
                _seed(source, (self._seed + place) % 2**63)  # not twice the same numbers
        else:
            _restore(self._sources, self._inside)

    def __exit__(self, *_) -> None:
        self._inside = None if self._once else self._states()
        _restore(self._sources, self._outside)

    def _states(self) -> list[Any]:
        return [_state(source) for source in self._sources]

    def was_drawn_from(self) -> bool:
        """Whether anything was drawn in it so far."""
        fresh = OwnRandomState(self._seed, self._sources[3:])
        with fresh:
            pass
        assert fresh._inside is not None
        assert self._inside is not None, "to be read after it was left"
        return not all(map(_equal, fresh._inside, self._inside))


def generators_of(thing: Any, depth: int = 3) -> list[Any]:
    """The random generators among the attributes of an object, and of the callables among them."""
    thing = getattr(thing, "__self__", thing)  # of a bound method
    found = []
    for value in list(getattr(thing, "__dict__", {}).values()):
        if isinstance(value, _GENERATORS):
            found.append(value)
        elif depth and callable(value) and not isinstance(value, (type, nn.Module, PreTrainedTokenizerBase)):
            found += [generator for generator in generators_of(value, depth - 1) if generator not in found]
    return found


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from numbers and strings."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.getstate() if hasattr(source, "getstate") else source.get_state()


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


def _restore(sources: list[Any], states: list[Any]) -> None:
    for source, state in zip(sources, states, strict=True):
        if isinstance(source, np.random.Generator):
            source.bit_generator.state = state
        elif hasattr(source, "setstate"):
            source.setstate(state)
        else:
            source.set_state(state)


def _seed(source: Any, seed: int) -> None:
    if isinstance(source, torch.Generator):
        source.manual_seed(seed)
    elif isinstance(source, np.random.Generator):
        source.bit_generator.state = type(source.bit_generator)(seed).state
    elif hasattr(source, "getstate"):
        source.seed(seed)
    else:
        source.seed(seed % 2**32)
