"""Whole training steps: against the stock Trainer, and each method against none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_recycle.bench.contestant import OURS, STOCK, Contestant, Turn
from hf_recycle.bench.machine import matrix_product_rates, memory_rates, product_sizes
from hf_recycle.bench.match import WARM_UP, hold_match
from hf_recycle.bench.pairs import estimate, spread
from hf_recycle.bench.reach import Peak, reach, step_floor
from hf_recycle.bench.row import Bench, Effort, Measured, NotMeasured, Row, Target
from hf_recycle.bench.shapes import MEDIUM, SMALL, TINY, Shape
from hf_recycle.errors import UserError
from hf_recycle.onednn import is_faster

# From the first step on a tenth of all neurons is in transition, and stays so.
_IN_TRANSITION = {"recycle_steps": 100, "recycle_start": 1, "recycle_fraction": 0.1, "recycle_smooth_steps": 100_000}
EVERYTHING = {
    **_IN_TRANSITION,
    "recycle_immunity": 2,
    "midpoint_weight": 1e-3,
    "magnitude_steps": 100,
}
"""All methods that go together."""

_AT_EVERY_STEP = {
    "smooth": _IN_TRANSITION,
    "midpoint": {"midpoint_weight": 1e-3},
}
_AT_EVERY_HUNDREDTH = {
    # Here at every step, so that pairs of steps can tell what it costs.
    "recycling": {"recycle_steps": 1, "recycle_start": 1, "recycle_fraction": 0.1},
    "magnitudes": {"magnitude_steps": 1},
}

_SAME_LOSS = 1e-4  # relative; float32 sums in another order


def against_stock(shape: Shape, effort: Effort) -> tuple[Measured, Measured | NotMeasured]:
    """The stock Trainer's step over ours, and our peak memory over its, with all methods on.

    That both train the same model on the same masks is checked in the same match, by a third contestant: ours with the
    stock collator and no method, whose losses must be the stock Trainer's. A fourth tells what oneDNN is worth where it
    is used.

    Raises:
        UserError: if its losses are others.
    """
    contestants = [
        Contestant("stock", STOCK, shape),
        Contestant("no method", OURS, shape, {"deterministic_masking": False}),
        Contestant("everything", OURS, shape, EVERYTHING),
    ]
    if is_faster():
        contestants.append(Contestant("without oneDNN", OURS, shape, {**EVERYTHING, "onednn_linear": False}))
    turns = hold_match(contestants, effort.rounds)
    worst = _difference(turns["stock"], turns["no method"])
    if worst > _SAME_LOSS:
        raise UserError(f"the losses of Trainer and RecyclingTrainer differ by {worst:.1e} on the same batches")
    seconds = {name: _seconds(taken) for name, taken in turns.items()}
    ratios = {name: [a / b for a, b in zip(seconds["stock"], seconds[name], strict=True)] for name in seconds}
    note = (
        f"{_milliseconds(seconds['stock'])} → {_milliseconds(seconds['everything'])} ms; without a method "
        f"{estimate(ratios['no method']).median:.2f}×, its losses equal to {worst:.0e}; {_reach(shape, seconds)}"
    )
    if "without oneDNN" in ratios:
        found = estimate(ratios["without oneDNN"])
        note += f"; with onednn_linear off {found.median:.2f}× ({found.low:.2f} to {found.high:.2f})"
    raw = {"seconds": seconds, "relative difference of losses": worst}
    speed = Measured(estimate(ratios["everything"]), note, raw)
    return speed, _memory(turns)


def _memory(turns: Mapping[str, Sequence[Turn]]) -> Measured | NotMeasured:
    peaks = {name: taken[-1].peak for name, taken in turns.items()}
    if None in peaks.values():
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


def costs_of_methods(shape: Shape, effort: Effort) -> dict[str, Measured]:
    """What each method adds to a step of ours with none, as a share of it.

    A share to be divided by a hundred needs fewer rounds than one that is judged as it is. Two processes with the same
    training may differ by a percent for as long as they live, by where their memory came to lie; so that one is
    measured in several matches, of new processes each.
    """
    half = max(effort.rounds // 2, 2)
    return _costs(shape, _AT_EVERY_STEP, 1, [half] * 4) | _costs(shape, _AT_EVERY_HUNDREDTH, 100, [half])


def _costs(
    shape: Shape, methods: Mapping[str, Mapping[str, Any]], usual_steps: int, matches: Sequence[int]
) -> dict[str, Measured]:
    """What `methods` add to a step, in matches of so many rounds each; spread over `usual_steps`."""
    contestants = [Contestant("none", OURS, shape)]
    contestants += [Contestant(name, OURS, shape, arguments) for name, arguments in methods.items()]
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for rounds in matches:
        for name, taken in hold_match(contestants, rounds).items():
            seconds[name] += _seconds(taken)
    none = seconds.pop("none")
    note = f"on a step of {_milliseconds(none)} ms; quartiles of that {100 * spread(none):.1f}% apart"
    if len(matches) > 1:
        note += f"; {len(matches)} matches"
    if usual_steps > 1:
        note += f"; measured at every step, and its cost spread over {usual_steps}"
    measured = {}
    for name, taken in seconds.items():
        added = [(with_it - without) / without / usual_steps for with_it, without in zip(taken, none, strict=True)]
        measured[name] = Measured(estimate(added), note, {"seconds": {"none": none, name: taken}})
    return measured


def _seconds(turns: Sequence[Turn]) -> list[float]:
    return [turn.seconds for turn in turns[WARM_UP:]]


def _difference(one: Sequence[Turn], other: Sequence[Turn]) -> float:
    """The largest relative difference of the losses of two trainings, step by step."""
    return max(abs(a.loss - b.loss) / abs(a.loss) for a, b in zip(one, other, strict=True))


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * estimate(seconds).median:,.0f}"


def _stock_rows(shape: Shape, speed: Row, memory: Row | None) -> Bench:
    def run(effort: Effort) -> dict[str, Measured | NotMeasured]:
        faster, smaller = against_stock(TINY if effort.quick else shape, effort)
        return {speed.name: faster} | ({memory.name: smaller} if memory else {})

    return Bench((speed, memory) if memory else (speed,), run, memory=8e9)


def _run_costs(effort: Effort) -> dict[str, Measured]:
    return costs_of_methods(TINY if effort.quick else MEDIUM, effort)


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
    Bench(
        (
            Row("recycling", "plain recycling, 10% every 100 steps", Target(0.005, False, "cost")),
            Row("smooth", "smooth recycling, 10% of the neurons in transition", Target(0.02, False, "cost")),
            Row("midpoint", "midpoint loss at every step", Target(0.02, False, "cost")),
            Row("magnitudes", "magnitude histograms every 100 steps", Target(0.005, False, "cost")),
        ),
        _run_costs,
        memory=10e9,
    ),
)
