"""The results of a bench as a Markdown page and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.row import NOT_JUDGED, Effort, Measured, NotMeasured, Row

_METHOD = """\
Trainings take their steps in turn (A B C, C B A, ...), each in a process of its own; the step of one is compared with
the step of the other right beside it. What a method costs is told by one training in which it is on at one step and off
at the next: the same training in two processes may differ by a percent for as long as they live. Given are medians over
these pairs and intervals that hold the median with 95% confidence (of fewer than six values, their range); a target is
met or missed where the whole interval says so, and else the machine was too noisy to tell."""

_QUICK = "\n\n**A quick run: small models in the place of those that the rows name. It shows that the bench works.**"

Result = tuple[Row, Measured | NotMeasured]


def verdict(row: Row, found: Measured | NotMeasured, effort: Effort) -> str:
    """In one of the words of `benchmarks.row`."""
    if isinstance(found, NotMeasured):
        return found.verdict
    return NOT_JUDGED if effort.quick else row.target.verdict(found.value)


def markdown(results: Sequence[Result], facts: Mapping[str, str], command: str, effort: Effort) -> str:
    """The page: command, machine, table, and a line on how each row was measured."""
    parts = [
        "# Benchmarks",
        f"```\n{command}\n```",
        _METHOD + _QUICK * effort.quick,
        "\n".join(f"* {name}: {value}" for name, value in facts.items()),
        "\n".join(
            ["| | target | median | 95% interval | verdict |", "|---|---|---|---|---|", *_lines(results, effort)]
        ),
        "\n".join(f"* **{row.name}**: {_note(found)}" for row, found in results),
    ]
    return "\n\n".join(parts) + "\n"


def as_json(results: Sequence[Result], facts: Mapping[str, str], command: str, effort: Effort) -> dict[str, Any]:
    """All of it with the raw numbers, as JSON types."""
    return {
        "command": command,
        "machine": dict(facts),
        "effort": asdict(effort),
        "rows": [{**asdict(row), **asdict(found), "verdict": verdict(row, found, effort)} for row, found in results],
    }


def _lines(results: Sequence[Result], effort: Effort) -> list[str]:
    lines = []
    for row, found in results:
        cells = [f"{row.what} (`{row.name}`)", str(row.target)]
        if isinstance(found, NotMeasured):
            cells += ["", ""]
        else:
            write, value = row.target.write, found.value
            interval = f"{write(value.low)} to {write(value.high)}, {value.pairs} pairs"
            cells += [write(value.median), interval if value.pairs > 1 else "measured once"]
        lines.append("| " + " | ".join([*cells, verdict(row, found, effort)]) + " |")
    return lines


def _note(found: Measured | NotMeasured) -> str:
    return found.reason if isinstance(found, NotMeasured) else found.note
