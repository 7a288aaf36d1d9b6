"""The head of a causal language model in chunks, against the whole head in the same trainer."""

from __future__ import annotations

from benchmarks.contestant import OURS, Contestant
from benchmarks.match import hold_match
from benchmarks.pairs import estimate
from benchmarks.row import Bench, Effort, Measured, NotMeasured, Row, Target
from benchmarks.shapes import CAUSAL, CAUSAL_TINY
from benchmarks.steps import SAME_LOSS, difference, milliseconds, seconds_of
from hf_recycle.errors import UserError

_SPEED = Row("causal-step", f"training step with the head in chunks against the whole head, {CAUSAL.name}, "
             f"vocabulary {CAUSAL.vocabulary:,}", Target(0.9, True))  # fmt: skip
_MEMORY = Row("causal-memory", "peak memory of that step, above the idle process", Target(0.7, False))


def _run(effort: Effort) -> dict[str, Measured | NotMeasured]:
    """Raises a UserError if the losses differ by more than rounding."""
    shape = CAUSAL_TINY if effort.quick else CAUSAL
    # A method that does nothing yet, so that both save what else is saved.
    both = {"deterministic_masking": False, "magnitude_steps": 100_000}
    turns = hold_match(
        [Contestant(name, OURS, shape, {**both, "chunked_head": name == "chunks"}) for name in ("whole", "chunks")],
        effort.rounds,
    )
    worst = difference(turns["whole"], turns["chunks"])
    if worst > SAME_LOSS:
        raise UserError(f"the losses with and without chunks differ by {worst:.1e} on the same batches")
    seconds = {name: seconds_of(taken) for name, taken in turns.items()}
    ratios = [whole / chunks for whole, chunks in zip(seconds["whole"], seconds["chunks"], strict=True)]
    rates = {name: shape.tokens / estimate(taken).median for name, taken in seconds.items()}
    note = (
        f"{milliseconds(seconds['whole'])} → {milliseconds(seconds['chunks'])} ms, {rates['whole']:,.0f} → "
        f"{rates['chunks']:,.0f} tokens/s; losses equal to {worst:.0e}; {shape}"
    )
    speed = Measured(estimate(ratios), note, {"seconds": seconds, "relative difference of losses": worst})
    peaks = {name: peak for name, taken in turns.items() if (peak := taken[-1].peak) is not None}
    if len(peaks) < len(turns):
        return {_SPEED.name: speed, _MEMORY.name: NotMeasured("this system does not tell the peak memory of a process")}
    mib = {name: peak / 2**20 for name, peak in peaks.items()}
    memory = Measured(
        estimate([mib["chunks"] / mib["whole"]]), f"{mib['whole']:,.0f} → {mib['chunks']:,.0f} MiB", {"MiB": mib}
    )
    return {_SPEED.name: speed, _MEMORY.name: memory}


BENCHES = (Bench((_SPEED, _MEMORY), _run, memory=6e9),)
