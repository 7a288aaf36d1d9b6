"""On a GPU, compiled and in bf16: tokens per second against the stock Trainer, and FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.contestant import OURS, STOCK, Contestant
from benchmarks.floor import matrix_product_flops
from benchmarks.match import WARM_UP, hold_match
from benchmarks.pairs import estimate
from benchmarks.row import Bench, Effort, Measured, NotMeasured, Row, Target
from benchmarks.shapes import GPU_MEDIUM, TINY, Shape
from benchmarks.steps import EVERYTHING

_SPEED = Row("gpu-step", "tokens per second against the stock Trainer, GPU, bf16, compiled", Target(1.4, True))
_USE = Row("gpu-use", "model FLOPs utilisation of that step, GPU, bf16, compiled", Target(0.4, True, "share"))

_ARGUMENTS = {"bf16": True, "torch_compile": True, "dataloader_num_workers": 4}

# Dense bf16 operations per second, as the maker states them, by a part of the device's name.
_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def against_stock(
    shape: Shape, rounds: int, arguments: Mapping[str, Any], peak: float | None
) -> dict[str, Measured | NotMeasured]:
    """The stock Trainer's step over ours with all methods on, and the FLOPs of ours over what the device could do.

    Args:
        arguments: of both trainings.
        peak: FLOPs per second of the device; None: unknown.
    """
    contestants = [
        Contestant("stock", STOCK, shape, arguments),
        Contestant("everything", OURS, shape, {**arguments, **EVERYTHING}),
    ]
    turns = hold_match(contestants, rounds)
    stock, ours = ([turn.seconds for turn in turns[name][WARM_UP:]] for name in ("stock", "everything"))
    rates = [shape.tokens / estimate(seconds).median for seconds in (stock, ours)]
    speed = Measured(
        estimate([a / b for a, b in zip(stock, ours, strict=True)]),
        f"{rates[0]:,.0f} → {rates[1]:,.0f} tokens per second, {shape}",
        {"seconds": {"stock": stock, "everything": ours}},
    )
    if peak is None:
        return {_SPEED.name: speed, _USE.name: NotMeasured("the peak of this device is not known here")}
    # Only what is computed counts: the head on masked positions.
    flops = sum(matrix_product_flops(shape.step(), masked_head=True).values())
    use = Measured(
        estimate([flops / seconds / peak for seconds in ours]),
        f"{flops / 1e9:,.0f} GFLOP a step (matrix products, head on masked positions) of {peak / 1e12:.0f} TFLOP/s",
    )
    return {_SPEED.name: speed, _USE.name: use}


def known_peak(device: str) -> float | None:
    """Dense bf16 FLOPs per second of a device by its name; None if it is not in our list."""
    return next((peak for part, peak in _PEAKS.items() if part in device), None)


def _run(effort: Effort) -> dict[str, Measured | NotMeasured]:
    import torch

    peak = known_peak(torch.cuda.get_device_name())
    return against_stock(TINY if effort.quick else GPU_MEDIUM, effort.rounds, _ARGUMENTS, peak)


BENCHES = (Bench((_SPEED, _USE), _run, memory=8e9, gpu=True),)
