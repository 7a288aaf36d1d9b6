"""Two ways to train the same model in the same trainer: their steps per second, and the memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.contestant import OURS, Contestant
from benchmarks.match import hold_match
from benchmarks.pairs import estimate
from benchmarks.row import Effort, Measured, NotMeasured, Row
from benchmarks.shapes import Shape
from benchmarks.steps import SAME_LOSS, difference, milliseconds, seconds_of
from hf_recycle.errors import UserError


def compare(
    speed: Row, memory: Row, shape: Shape, arms: Mapping[str, Mapping[str, Any]], effort: Effort, *, same_losses: bool
) -> dict[str, Measured | NotMeasured]:
    """The step of the first arm over that of the second, and the second's peak memory over the first's.

    Args:
        arms: two, by name, with the training arguments in which they differ.
        same_losses: they compute the same.

    Raises:
        UserError: if they should and their losses differ by more than rounding.
    """
    before, after = arms
    # A method that does nothing yet, so that both save what else is saved.
    both = {"deterministic_masking": False, "magnitude_steps": 100_000}
    turns = hold_match([Contestant(name, OURS, shape, {**both, **own}) for name, own in arms.items()], effort.rounds)
    worst = difference(turns[before], turns[after])
    if same_losses and worst > SAME_LOSS:
        raise UserError(f"the losses of {before} and {after} differ by {worst:.1e} on the same batches")
    seconds = {name: seconds_of(taken) for name, taken in turns.items()}
    ratios = [one / other for one, other in zip(seconds[before], seconds[after], strict=True)]
    rates = {name: shape.tokens / estimate(taken).median for name, taken in seconds.items()}
    note = (
        f"{before} → {after}: {milliseconds(seconds[before])} → {milliseconds(seconds[after])} ms, "
        f"{rates[before]:,.0f} → {rates[after]:,.0f} tokens/s; "
        + (f"losses equal to {worst:.0e}; " if same_losses else "")
        + str(shape)
    )
    faster = Measured(estimate(ratios), note, {"seconds": seconds, "relative difference of losses": worst})
    peaks = {name: peak for name, taken in turns.items() if (peak := taken[-1].peak) is not None}
    if len(peaks) < len(turns):
        return {speed.name: faster, memory.name: NotMeasured("this system does not tell the peak memory of a process")}
    mib = {name: peak / 2**20 for name, peak in peaks.items()}
    note = f"{before} → {after}: {mib[before]:,.0f} → {mib[after]:,.0f} MiB"
    return {speed.name: faster, memory.name: Measured(estimate([mib[after] / mib[before]]), note, {"MiB": mib})}
