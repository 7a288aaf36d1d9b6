"""Random numbers for each example of a batch, whatever code draws them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_recycle.batches.counter import GOLDEN, below, draw, mix, uniform


class ExampleDraws(TorchFunctionMode):
    """While it is on, what torch draws at random on the CPU for a batch, a tensor whose first dimension is the batch,
    comes row by row from the examples' own keys. So an example gets the same numbers in every batch, in any data
    worker, on any process.

    It answers for `bernoulli`, `rand`, `rand_like`, `randint` and `bernoulli_`, `uniform_`; their `generator` is
    neither asked nor advanced. Everything else, and tensors of other shapes, are drawn as usual.

    Args:
        keys: uint64 `(batch,)`.
        padding: gives, for a width in tokens, how many of them are padding on the left of each row, int64 `(batch,)`.
            None: rows are padded on the right.
    """

    def __init__(self, keys: np.ndarray, padding: Callable[[int], np.ndarray] | None = None) -> None:
        super().__init__()
        self._keys, self._padding, self._calls = keys, padding, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        drawn = answer(self, *args, **kwargs) if answer else None
        return func(*args, **kwargs) if drawn is None else drawn

    def words(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Random words, uint64 of `shape`; None if its first dimension is not the batch."""
        if not shape or shape[0] != len(self._keys):
            return None
        self._calls += 1
        keys = mix(self._keys + np.array([self._calls], dtype=np.uint64) * GOLDEN)
        positions = np.arange(math.prod(shape[1:]))[None]
        if self._padding is not None and len(shape) == 2:
            positions = positions - self._padding(shape[1])[:, None]
        return draw(keys[:, None], positions, 0, of=1).reshape(shape)

    def uniform(self, shape: tuple[int, ...]) -> Tensor | None:
        """Float64 in [0, 1)."""
        words = self.words(shape)
        return None if words is None else torch.from_numpy(uniform(words))


def _bernoulli(draws: ExampleDraws, like: Tensor, p: float | None = None, *, generator=None, out=None):
    if out is not None or like.device.type != "cpu" or not like.numel():
        return None
    chances = like.detach().double().numpy() if p is None else np.array(float(p))
    if not (chances.min() >= 0 and chances.max() <= 1):
        return None  # torch says what is wrong
    words = draws.words(tuple(like.shape))
    return None if words is None else torch.from_numpy(uniform(words) < chances).to(like.dtype)


def _bernoulli_in_place(draws: ExampleDraws, tensor: Tensor, p: float | Tensor = 0.5, *, generator=None):
    chance = p if isinstance(p, Tensor) else torch.full(tensor.shape, float(p))
    drawn = _bernoulli(draws, chance.expand(tensor.shape)) if tensor.device.type == "cpu" else None
    return None if drawn is None else tensor.copy_(drawn)


def _rand(draws: ExampleDraws, *sizes, size=None, generator=None, dtype=None, **other):
    shape = _shape(sizes if size is None else (size,))
    if shape is None or any(value for value in other.values()):
        return None
    return _floats(draws, shape, dtype or torch.get_default_dtype())


def _rand_like(draws: ExampleDraws, like: Tensor, *, dtype=None, generator=None, **other):
    if like.device.type != "cpu" or any(value for value in other.values()):
        return None
    return _floats(draws, tuple(like.shape), dtype or like.dtype)


def _uniform_in_place(draws: ExampleDraws, tensor: Tensor, low: float = 0.0, high: float = 1.0, *, generator=None):
    drawn = _floats(draws, tuple(tensor.shape), tensor.dtype) if tensor.device.type == "cpu" else None
    return None if drawn is None else tensor.copy_(low + (high - low) * drawn)


def _randint(draws: ExampleDraws, *numbers, low=0, high=None, size=None, generator=None, dtype=None, **other):
    given = list(numbers)
    shape = _shape((given.pop() if size is None else size,))
    high = given.pop() if high is None else high
    low = given.pop() if given else low
    if shape is None or given or high <= low or any(value for value in other.values()):
        return None
    words = draws.words(shape)
    if words is None:
        return None
    span = high - low
    values = below(words, span) if span < 2**32 else (words % np.uint64(span)).astype(np.int64)
    return torch.from_numpy(values + low).to(dtype or torch.int64)


def _floats(draws: ExampleDraws, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if dtype not in (torch.float32, torch.float64):
        return None
    lots = draws.uniform(shape)
    # Rounded down: a float32 must not become 1.
    return lots if lots is None or dtype == torch.float64 else ((lots * 2**24).floor() * 2**-24).float()


def _shape(sizes: tuple[Any, ...]) -> tuple[int, ...] | None:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return sizes if all(isinstance(size, int) for size in sizes) else None


_ANSWERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_in_place,
    torch.rand: _rand,
    torch.rand_like: _rand_like,
    Tensor.uniform_: _uniform_in_place,
    torch.randint: _randint,
}
