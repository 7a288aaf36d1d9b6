"""How much faster one model is than another: paired, interleaved measurements."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Speedup:
    """Medians over pairs of runs, one of each model right after the other.

    Attributes:
        before, after: seconds of one forward pass.
        low, high: quartiles of before / after over the pairs.
    """

    before: float
    after: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """How many times as fast."""
        return self.before / self.after

    def __str__(self) -> str:
        told = "" if self.low > 1 or self.high < 1 else ": no difference that can be told from noise"
        return (
            f"{_milliseconds(self.before)} ms -> {_milliseconds(self.after)} ms, {self.ratio:.2f}x as fast "
            f"(quartiles of the pairs: {self.low:.2f} to {self.high:.2f}){told}"
        )


def speedup(before: Callable[[], object], after: Callable[[], object], pairs: int = 11) -> Speedup:
    """Times two functions alternately, each after one call to warm up."""
    times = [(_seconds(before), _seconds(after)) for _ in range(pairs + 1)][1:]
    ratios = [first / second for first, second in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    first, second = (statistics.median(side) for side in zip(*times, strict=True))
    return Speedup(first, second, low, high)


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A forward pass without gradients, finished when it returns."""

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _milliseconds(seconds: float) -> str:
    """Three digits that count: as many as the ratio of two of them needs."""
    return f"{1e3 * seconds:.{max(0, 2 - math.floor(math.log10(1e3 * seconds)))}f}"


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
