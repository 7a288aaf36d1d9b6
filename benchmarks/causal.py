"""The head of a causal language model in chunks, against the whole head in the same trainer."""

from __future__ import annotations

from benchmarks.arms import compare
from benchmarks.row import Bench, Effort, Measured, NotMeasured, Row, Target
from benchmarks.shapes import CAUSAL, CAUSAL_TINY

_SPEED = Row("causal-step", f"training step with the head in chunks against the whole head, {CAUSAL.name}, "
             f"vocabulary {CAUSAL.vocabulary:,}", Target(0.9, True))  # fmt: skip
_MEMORY = Row("causal-memory", "peak memory of that step, above the idle process", Target(0.7, False))


def _run(effort: Effort) -> dict[str, Measured | NotMeasured]:
    arms = {name: {"chunked_head": name == "chunks"} for name in ("whole", "chunks")}
    shape = CAUSAL_TINY if effort.quick else CAUSAL
    return compare(_SPEED, _MEMORY, shape, arms, effort, same_losses=True)


BENCHES = (Bench((_SPEED, _MEMORY), _run, memory=6e9),)
