"""What each method adds to a step of ours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.contestant import OURS, Contestant, Turn
from benchmarks.match import WARM_UP, hold_match
from benchmarks.pairs import estimate, spread
from benchmarks.row import Bench, Effort, Measured, Row, Target
from benchmarks.shapes import MEDIUM, TINY, Shape
from benchmarks.steps import FADING_IN
from benchmarks.switch import is_on

_AT_EVERY_STEP: dict[str, dict[str, Any]] = {
    "smooth": FADING_IN,
    "midpoint": {"midpoint_weight": 1e-3},
}
# Here at every step that they are on, so that pairs of steps can tell what they cost.
_AT_EVERY_HUNDREDTH: dict[str, dict[str, Any]] = {
    "recycling": {"recycle_steps": 1, "recycle_start": 1, "recycle_fraction": 0.1},
    "magnitudes": {"magnitude_steps": 1},
}
# What comes before is plain recycling, whose own cost has a row; the probe looks at 8 extra batches.
_AT_EVERY_THOUSANDTH = {
    name: _AT_EVERY_HUNDREDTH["recycling"] | {"recycle_selection": criterion}
    for name, criterion in (("probe", "dormant"), ("probe-gradients", "fisher"), ("obs", "obs"))
}
_USUAL_STEPS = {
    **dict.fromkeys(_AT_EVERY_STEP, 1),
    **dict.fromkeys(_AT_EVERY_HUNDREDTH, 100),
    **dict.fromkeys(_AT_EVERY_THOUSANDTH, 1000),
}


def costs_of_methods(shape: Shape, effort: Effort) -> dict[str, Measured]:
    """What each method adds to a step, as a share; spread over a hundred steps for what is done at each hundredth.

    A share to be divided by a hundred needs fewer pairs than one that is judged as it is. Each training has the machine
    to itself, so that the two steps of a pair follow each other.
    """
    often = {name: _measure(name, arguments, shape, 3 * effort.rounds) for name, arguments in _AT_EVERY_STEP.items()}
    pairs = max(effort.rounds // 2, 2)
    return often | {name: _measure(name, arguments, shape, pairs) for name, arguments in _AT_EVERY_HUNDREDTH.items()}


def cost_of_probe(name: str, effort: Effort) -> dict[str, Measured]:
    """As `costs_of_methods`, for phases that look at data, one in a thousand steps: of those few pairs are enough."""
    shape, pairs = TINY if effort.quick else MEDIUM, max(effort.rounds // 10, 2)
    return {name: _measure(name, _AT_EVERY_THOUSANDTH[name], shape, pairs)}


def _measure(method: str, arguments: dict[str, Any], shape: Shape, pairs: int) -> Measured:
    [turns] = hold_match([Contestant(method, OURS, shape, arguments, method)], 2 * pairs).values()
    return _cost(turns, _USUAL_STEPS[method])


def _cost(turns: Sequence[Turn], usual_steps: int) -> Measured:
    """What a method adds to a step, from a training in which it was switched on and off."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number, turn in enumerate(turns[WARM_UP:], WARM_UP + 1):
        seconds[is_on(number)].append(turn.seconds)
    pairs = zip(seconds[True], seconds[False], strict=True)
    note = (
        f"on a step of {1e3 * estimate(seconds[False]).median:,.0f} ms; quartiles of that "
        f"{100 * spread(seconds[False]):.1f}% apart"
    )
    if usual_steps > 1:
        note += f"; what a step with it costs more, spread over {usual_steps}"
    added = [(on - off) / off / usual_steps for on, off in pairs]
    return Measured(estimate(added), note, {"seconds": {"on": seconds[True], "off": seconds[False]}})


def _run(effort: Effort) -> dict[str, Measured]:
    return costs_of_methods(TINY if effort.quick else MEDIUM, effort)


_PROBES = (
    Row("probe", "recycling by activity (dormant), a phase every 1,000 steps", Target(0.01, False, "cost")),
    Row("probe-gradients", "the same by gradients (fisher)", Target(0.03, False, "cost")),
    Row("obs", "the same by the optimal brain surgeon (obs)", Target(0.05, False, "cost")),
)

BENCHES = (
    Bench(
        (
            Row("recycling", "plain recycling, 10% every 100 steps", Target(0.005, False, "cost")),
            Row("smooth", "smooth recycling, 10% of the neurons that fade in", Target(0.02, False, "cost")),
            Row("midpoint", "midpoint loss at every step", Target(0.02, False, "cost")),
            Row("magnitudes", "magnitude histograms every 100 steps", Target(0.005, False, "cost")),
        ),
        _run,
        memory=4e9,
    ),
    *(Bench((row,), partial(cost_of_probe, row.name), memory=4e9) for row in _PROBES),
)
