"""The rows on selection phases: against reading the weights once, and as models grow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from benchmarks.pairs import estimate
from benchmarks.phase_cost import SHAPES, PhaseCost, phase_cost
from benchmarks.row import Bench, Effort, Measured, Row, Target

_COST = Row("phase", "selection phase of 1%, against reading the FF weights once, BERT Large", Target(2.0, False))
_SELECTION = Row("magnitudes-read", "magnitudes of all neurons, against the same, BERT Large", Target(2.0, False))
_GROWTH = Row(
    "phase-growth", "growth of a phase with d_ff × d_model × layers, 1 is linear", Target(1.05, False, "power")
)


def _run(effort: Effort) -> Mapping[str, Measured]:
    shapes = dict(list(SHAPES.items())[:2]) if effort.quick else SHAPES
    # Rounds of all shapes together take a third of a second: many of them cost little and narrow the interval.
    costs = {name: phase_cost(shape, repetitions=4 * effort.rounds) for name, shape in shapes.items()}
    largest = list(costs.values())[-1]
    return {
        _COST.name: Measured(estimate(_in_reads(largest, "phase_keep")), _note(costs, "phase_keep"), _samples(costs)),
        _SELECTION.name: Measured(estimate(_in_reads(largest, "magnitudes")), _note(costs, "magnitudes")),
        _GROWTH.name: Measured(estimate(growth(costs)), "exponent of a power law through the shapes above"),
    }


def growth(costs: Mapping[str, PhaseCost]) -> list[float]:
    """The exponent of a power law through the phases of all shapes, for each round of the measurement."""
    weights = [math.log(cost.shape.weights) for cost in costs.values()]
    rounds = zip(*(cost.phase_keep.samples for cost in costs.values()), strict=True)
    return [float(np.polyfit(weights, np.log(seconds), 1)[0]) for seconds in rounds]


def _in_reads(cost: PhaseCost, operation: str) -> list[float]:
    times = getattr(cost, operation).samples
    return [seconds / read for seconds, read in zip(times, cost.read.samples, strict=True)]


def _note(costs: Mapping[str, PhaseCost], operation: str) -> str:
    by_shape = ", ".join(f"{name} {cost.in_reads(operation):.1f}×" for name, cost in costs.items())
    reset = max(cost.in_reads("phase_reset") for cost in costs.values())
    rest = f"; with the optimizer state reset up to {reset:.1f}×" if operation == "phase_keep" else ""
    return f"CPU time on one thread, optimizer state kept: {by_shape}{rest}"


def _samples(costs: Mapping[str, PhaseCost]) -> dict[str, dict[str, list[float]]]:
    operations = ("read", "magnitudes", "phase_keep", "phase_reset")
    return {name: {part: list(getattr(cost, part).samples) for part in operations} for name, cost in costs.items()}


BENCHES = (Bench((_COST, _SELECTION, _GROWTH), _run, memory=3.5e9),)
