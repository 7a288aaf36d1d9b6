"""How fast this machine multiplies matrices and moves memory, at best.

Measured with as many threads as torch is set to use, on memory allocated beforehand.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.floor import Step
from hf_recycle.speed.onednn import is_available, multiply

LEAST_SECONDS = 0.02
"""What is shorter is called repeatedly to take about so long, so that neither clock nor launch of a kernel shows."""


@dataclass(frozen=True)
class Rate:
    """Work per second: the median over repeats, and the quartiles."""

    median: float
    low: float
    high: float


def product_sizes(step: Step) -> list[tuple[int, int, int]]:
    """`(m, k, n)` of products `(m, k) @ (k, n)` that a step mostly consists of: both projections of an FF, the gradient
    of their weights, the decoder on masked tokens."""
    tokens, d, d_ff = step.tokens, step.d_model, step.d_ff
    return [(tokens, d, d_ff), (tokens, d_ff, d), (d, tokens, d_ff), (step.masked_tokens, d, step.vocabulary)]


def matrix_product_rates(
    sizes: Iterable[tuple[int, int, int]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
) -> dict[tuple[int, int, int], Rate]:
    """Floating-point operations per second of one matrix product of each of the `sizes`, over at least 2 `repeats`, by
    the faster of PyTorch's libraries."""
    rates = {}
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        products: list[Callable[[], object]] = [partial(torch.mm, a, b, out=out)]
        if a.is_cpu and dtype == torch.float32 and is_available():
            products.append(partial(multiply, a, b.T))
        measured = [_rate(product, 2 * m * k * n, a.device, repeats) for product in products]
        rates[m, k, n] = max(measured, key=lambda rate: rate.median)
    return rates


def memory_rates(device: str | torch.device = "cpu", size: int = 2**28, repeats: int = 7) -> dict[str, Rate]:
    """Bytes per second read and written by a sum, a copy and an update in place.

    Args:
        size: bytes of a float32 tensor, so many that no cache holds it; two are allocated.
    """
    numbers = torch.ones(size // 4, device=device)
    copy = torch.empty_like(numbers)
    once = numbers.nbytes
    work = {
        "read": (lambda: torch.sum(numbers), once),
        "copy": (lambda: copy.copy_(numbers), 2 * once),
        "update": (lambda: numbers.add_(1), 2 * once),
    }
    return {name: _rate(function, amount, numbers.device, repeats) for name, (function, amount) in work.items()}


@torch.inference_mode()
def _rate(function: Callable[[], object], amount: int, device: torch.device, repeats: int) -> Rate:
    function()
    calls = max(1, math.ceil(LEAST_SECONDS / max(_seconds(function, 1, device), 1e-9)))
    rates = [calls * amount / _seconds(function, calls, device) for _ in range(repeats)]
    low, median, high = statistics.quantiles(rates, n=4)
    return Rate(median, low, high)


def _seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
