"""Whole training steps against those of the stock Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.contestant import OURS, STOCK, Contestant, Turn
from benchmarks.machine import matrix_product_rates, memory_rates, product_sizes
from benchmarks.match import WARM_UP, hold_match
from benchmarks.pairs import estimate
from benchmarks.reach import Peak, reach, step_floor
from benchmarks.row import Bench, Effort, Measured, NotMeasured, Row, Target
from benchmarks.shapes import MEDIUM, SMALL, TINY, Shape
from hf_recycle.errors import UserError

# From the first step on a tenth of all neurons is fading in, and stays so.
FADING_IN = {"recycle_steps": 100, "recycle_start": 1, "recycle_fraction": 0.1, "recycle_smooth_steps": 100_000}
EVERYTHING = {
    **FADING_IN,
    "recycle_immunity": 2,
    "midpoint_weight": 1e-3,
    "magnitude_steps": 100,
}
"""All methods that go together."""

SAME_LOSS = 1e-4  # relative; float32 sums in another order


def against_stock(shape: Shape, effort: Effort) -> tuple[Measured, Measured | NotMeasured]:
    """The stock Trainer's step over ours, and our peak memory over its, with all methods on.

    That both train the same model on the same masks is checked in the same match, by a third contestant: ours with the
    stock collator and no method, whose losses must be the stock Trainer's.

    Raises:
        UserError: if its losses are others.
    """
    contestants = [
        Contestant("stock", STOCK, shape),
        Contestant("no method", OURS, shape, {"deterministic_masking": False}),
        Contestant("everything", OURS, shape, EVERYTHING),
    ]
    turns = hold_match(contestants, effort.rounds)
    worst = difference(turns["stock"], turns["no method"])
    if worst > SAME_LOSS:
        raise UserError(f"the losses of Trainer and RecyclingTrainer differ by {worst:.1e} on the same batches")
    seconds = {name: seconds_of(taken) for name, taken in turns.items()}
    ratios = {name: [a / b for a, b in zip(seconds["stock"], seconds[name], strict=True)] for name in seconds}
    note = (
        f"{milliseconds(seconds['stock'])} → {milliseconds(seconds['everything'])} ms; without a method "
        f"{estimate(ratios['no method']).median:.2f}×, its losses equal to {worst:.0e}; {_reach(shape, seconds)}"
    )
    raw = {"seconds": seconds, "relative difference of losses": worst}
    speed = Measured(estimate(ratios["everything"]), note, raw)
    return speed, _memory(turns)


def _memory(turns: Mapping[str, Sequence[Turn]]) -> Measured | NotMeasured:
    peaks = {name: peak for name, taken in turns.items() if (peak := taken[-1].peak) is not None}
    if len(peaks) < len(turns):
        return NotMeasured("this system does not tell the peak memory of a process")
    mib = {name: peak / 2**20 for name, peak in peaks.items()}
    note = f"{mib['stock']:,.0f} → {mib['everything']:,.0f} MiB; without a method {mib['no method']:,.0f} MiB"
    return Measured(estimate([mib["everything"] / mib["stock"]]), note, {"MiB": mib})


def _reach(shape: Shape, seconds: Mapping[str, Sequence[float]]) -> str:
    """How near either step comes to what this machine can do, measured now."""
    step = shape.step()
    peak = Peak.measured(matrix_product_rates(product_sizes(step)), memory_rates())
    reached = [
        reach(estimate(seconds[name]).median, step_floor(step, peak, masked_head=masked)).of_floor
        for name, masked in (("stock", False), ("everything", True))
    ]
    return f"{100 * reached[0]:.0f}% → {100 * reached[1]:.0f}% of the floor"


def seconds_of(turns: Sequence[Turn]) -> list[float]:
    return [turn.seconds for turn in turns[WARM_UP:]]


def difference(one: Sequence[Turn], other: Sequence[Turn]) -> float:
    """The largest relative difference of the losses of two trainings, step by step."""
    return max(abs(a.loss - b.loss) / abs(a.loss) for a, b in zip(one, other, strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * estimate(seconds).median:,.0f}"


def _stock_rows(shape: Shape, speed: Row, memory: Row | None) -> Bench:
    def run(effort: Effort) -> dict[str, Measured | NotMeasured]:
        faster, smaller = against_stock(TINY if effort.quick else shape, effort)
        return {speed.name: faster} | ({memory.name: smaller} if memory else {})

    return Bench((speed, memory) if memory else (speed,), run, memory=8e9)


BENCHES = (
    _stock_rows(
        MEDIUM,
        Row("step", f"training step against the stock Trainer, {MEDIUM.name}, all methods on", Target(1.6, True)),
        Row("memory", f"peak memory of that step, above the idle process, {MEDIUM.name}", Target(0.7, False)),
    ),
    _stock_rows(
        SMALL,
        Row("small-step", f"training step against the stock Trainer, {SMALL.name}, all methods on", Target(2.5, True)),
        None,
    ),
)
