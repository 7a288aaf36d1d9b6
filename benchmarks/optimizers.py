"""Muon against AdamW in the same trainer."""

from __future__ import annotations

from benchmarks.arms import compare
from benchmarks.row import Bench, Effort, Measured, NotMeasured, Row, Target
from benchmarks.shapes import MEDIUM, TINY

# Five steps of Newton and Schulz for each hidden matrix are about as many operations as the step of a batch this small.
_SPEED = Row("muon-step", f"training step with muon against adamw_torch, {MEDIUM.name}", Target(0.5, True))
_MEMORY = Row("muon-memory", "peak memory of that step, above the idle process", Target(1.0, False))


def _run(effort: Effort) -> dict[str, Measured | NotMeasured]:
    arms = {name: {"optim": name} for name in ("adamw_torch", "muon")}
    return compare(_SPEED, _MEMORY, TINY if effort.quick else MEDIUM, arms, effort, same_losses=False)


BENCHES = (Bench((_SPEED, _MEMORY), _run, memory=6e9),)
