"""Whether the data path keeps the training waiting."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.contestant import OURS, Contestant
from benchmarks.match import WARM_UP, hold_match
from benchmarks.pairs import estimate
from benchmarks.row import Bench, Effort, Measured, Row, Target
from benchmarks.shapes import MEDIUM, TINY

_ROW = Row("data", "share of the time at work rather than waiting for a batch, 2 workers", Target(0.97, True, "share"))

_BLOCK = 5  # steps


def _run(effort: Effort) -> Mapping[str, Measured]:
    shape = TINY if effort.quick else MEDIUM
    contestant = Contestant("loading", OURS, shape, {"dataloader_num_workers": 2})
    # Alone: workers that load while others have their turn would look faster than they are.
    turns = hold_match([contestant], effort.rounds)[contestant.name][WARM_UP:]
    seconds, waiting = sum(turn.seconds for turn in turns), sum(turn.waiting for turn in turns)
    note = f"waited {1e3 * waiting / len(turns):.1f} of {1e3 * seconds / len(turns):,.0f} ms a step, {shape}"
    # By time, over a few steps each: a median over steps would not see a wait that comes rarely.
    blocks = [turns[start : start + _BLOCK] for start in range(0, len(turns), _BLOCK)]
    shares = [1 - sum(t.waiting for t in block) / sum(t.seconds for t in block) for block in blocks]
    return {_ROW.name: Measured(estimate(shares), note, {"shares": shares})}


BENCHES = (Bench((_ROW,), _run, memory=4e9),)
