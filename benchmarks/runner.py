"""Measures the rows that were asked for, one bench after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import psutil
import torch

from benchmarks import analyzing, causal, costs, data_path, gpu, optimizers, phases, steps
from benchmarks.row import FAILED, Bench, Effort, Measured, NotMeasured, Row
from hf_recycle.errors import UserError

BENCHES: tuple[Bench, ...] = (
    *steps.BENCHES,
    *causal.BENCHES,
    *optimizers.BENCHES,
    *costs.BENCHES,
    *phases.BENCHES,
    *analyzing.BENCHES,
    *data_path.BENCHES,
    *gpu.BENCHES,
)


def all_rows() -> list[Row]:
    """In the order of the table."""
    return [row for bench in BENCHES for row in bench.rows]


def run_rows(
    names: Sequence[str], effort: Effort, say: Callable[[str], None]
) -> Iterator[tuple[Row, Measured | NotMeasured]]:
    """Measures rows by name, in the order of the table; what can't be measured here is skipped with a reason.

    Args:
        say: takes a line of progress.
    """
    for bench in BENCHES:
        wanted = [row for row in bench.rows if row.name in names]
        if not wanted:
            continue
        say(f"measuring {', '.join(row.name for row in wanted)} ...")
        reason = _too_small(bench, effort)
        found = dict.fromkeys((row.name for row in wanted), NotMeasured(reason)) if reason else _measure(bench, effort)
        yield from ((row, found[row.name]) for row in wanted)


def _measure(bench: Bench, effort: Effort) -> dict[str, Measured | NotMeasured]:
    try:
        return dict(bench.run(effort))
    except UserError as error:  # the other benches go on
        return dict.fromkeys((row.name for row in bench.rows), NotMeasured(str(error), FAILED))


def _too_small(bench: Bench, effort: Effort) -> str:
    if bench.gpu and not torch.cuda.is_available():
        return "needs a GPU"
    free = psutil.virtual_memory().available
    if free < bench.memory and not effort.quick:
        return f"needs {bench.memory / 1e9:.0f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""
