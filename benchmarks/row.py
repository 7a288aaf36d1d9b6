"""A row of the bench: what is measured, the target, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pairs import Estimate

MET, MISSED, NOISY, NOT_JUDGED = "met", "missed", "too noisy to tell", "not judged"
SKIPPED, FAILED = "skipped", "failed"


@dataclass(frozen=True)
class Target:
    """A bound for a ratio.

    Attributes:
        bound: as a plain number; a cost of 2% is 0.02.
        at_least: whether the ratio must reach the bound, rather than stay under it.
        unit: how it is written: "times", "cost" (a percentage with its sign), "share" (a percentage) or "power".
    """

    bound: float
    at_least: bool
    unit: str = "times"

    def verdict(self, measured: Estimate) -> str:
        """MET or MISSED if the whole interval says so, else NOISY."""
        side = 1 if self.at_least else -1
        ends = [side * (end - self.bound) >= 0 for end in (measured.low, measured.high)]
        return MET if all(ends) else NOISY if any(ends) else MISSED

    def write(self, value: float) -> str:
        written = {"times": f"{value:.2f}×", "cost": f"{100 * value:+.2f}%", "share": f"{100 * value:.1f}%"}
        return written.get(self.unit, f"{value:.2f}")

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.write(self.bound)}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what the command line calls it.
        what: the ratio in words.
    """

    name: str
    what: str
    target: Target


@dataclass(frozen=True)
class Measured:
    """What a bench found for one row.

    Attributes:
        value: the ratio.
        note: what a reader should know beside it.
        samples: the raw numbers, by name, for the JSON file.
    """

    value: Estimate
    note: str = ""
    samples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NotMeasured:
    """A row that can't be measured here.

    Attributes:
        reason: why.
        verdict: SKIPPED, or FAILED if it should have worked.
    """

    reason: str
    verdict: str = SKIPPED


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: pairs of each comparison.
        quick: small models and sizes, to see the bench work; nothing is judged.
    """

    rounds: int
    quick: bool


@dataclass(frozen=True)
class Bench:
    """A measurement that fills one or several rows.

    Attributes:
        run: measures; one entry for each row, by name.
        memory: bytes that it takes.
        gpu: whether it needs a GPU (and otherwise runs on the CPU).
    """

    rows: tuple[Row, ...]
    run: Callable[[Effort], Mapping[str, Measured | NotMeasured]]
    memory: float
    gpu: bool = False
