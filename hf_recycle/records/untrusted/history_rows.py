"""What the rows of a history of unknown origin must hold, beyond their shape.

Everything is checked column-wise, so a history of a million rows takes about a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_recycle.records.file_checks import MAX_NAME, fail
from hf_recycle.records.history_checks import block_codes, list_column, no_nulls, with_widths
from hf_recycle.records.recorder import (
    ACTIVITY_METRICS,
    HISTOGRAM_BINS,
    MAX_NOTE,
    OVERTRAINING_METRICS,
    QUANTILE_LEVELS,
    metric_values,
    rows_of_kind,
    were_skipped,
)

Blocks = Sequence[Mapping[str, Any]]


def check_rows(path: Path, table: pa.Table, blocks: Blocks) -> None:
    """Check every row of a history whose shape was checked by `check_history`, with the config's `blocks`."""
    _whole_numbers(path, table, "step", 0)
    table = with_widths(path, table, blocks)
    _check_notes(path, rows_of_kind(table, "resize"))
    _check_phases(path, rows_of_kind(table, "phase"), blocks)
    _check_prunings(path, rows_of_kind(table, "pruning"), blocks)
    _check_magnitudes(path, rows_of_kind(table, "magnitude"), blocks)
    _check_logs(path, rows_of_kind(table, "log"))
    _check_overtrainings(path, table)
    _check_activities(path, table, blocks)


def _check_phases(path: Path, rows: pa.Table, blocks: Blocks) -> None:
    codes = block_codes(path, rows, blocks)
    _check_notes(path, rows)
    steps = _whole_numbers(path, rows, "step", 0)
    phases = _whole_numbers(path, rows, "phase", 1)
    lengths = _check_chosen(path, rows, "recycled")
    if len(np.unique(steps * 2**32 + codes)) < len(steps):
        fail(path, "a block has two rows for one phase")
    done = ~were_skipped(rows)
    if (lengths[~done] > 0).any():
        fail(path, "a phase that was skipped recycled neurons")
    pairs = np.unique(np.stack([phases, steps], axis=1)[done], axis=0)
    if (np.diff(pairs[:, 0]) == 0).any() or (np.diff(pairs[:, 1]) <= 0).any():
        fail(path, "the phases are not in the order of their steps")


def _check_prunings(path: Path, rows: pa.Table, blocks: Blocks) -> None:
    codes = block_codes(path, rows, blocks)
    _check_notes(path, rows)
    _check_chosen(path, rows, "pruned")
    _, owners, pruned = list_column(path, rows, "pruned")
    keys = np.stack([rows["resizes"].to_numpy()[owners], codes[owners], pruned])
    if len(np.unique(keys, axis=1).T) < len(pruned):
        fail(path, "a neuron was pruned twice")


def _check_chosen(path: Path, rows: pa.Table, column: str) -> np.ndarray:
    """Checks a column of lists of neurons against the row's other numbers; returns the length of each list."""
    requested = _whole_numbers(path, rows, "requested", 0)
    eligible = _whole_numbers(path, rows, "eligible", 0)
    lengths, owners, neurons = list_column(path, rows, column)
    if (lengths > np.minimum(requested, eligible)).any():
        fail(path, f"more neurons were {column} than were requested or eligible")
    if (eligible > rows["width"].to_numpy()).any():
        fail(path, "more neurons were eligible than the block has")
    if len(np.unique(owners * 2**32 + neurons)) < len(neurons):
        fail(path, f"one neuron was {column} twice at once")
    return lengths


def _check_magnitudes(path: Path, rows: pa.Table, blocks: Blocks) -> None:
    block_codes(path, rows, blocks)
    _check_notes(path, rows)
    lengths, _, quantiles = list_column(path, rows, "quantiles")
    bins, owners, histogram = list_column(path, rows, "histogram")
    ends, _, edges = list_column(path, rows, "edges")
    full = lengths == len(QUANTILE_LEVELS)
    if (
        not (full | (lengths == 0)).all()
        or not (bins == full * HISTOGRAM_BINS).all()
        or not (ends == full * (HISTOGRAM_BINS + 1)).all()
    ):
        fail(path, "a magnitude histogram does not have the right number of quantiles, bins and edges")
    if not np.isfinite(quantiles).all() or not np.isfinite(edges).all() or (histogram < 0).any():
        fail(path, "a magnitude histogram holds negative counts or numbers that are not finite")
    if (np.diff(quantiles.reshape(-1, len(QUANTILE_LEVELS)), axis=1) < 0).any():
        fail(path, "the magnitude quantiles of a row are not ascending")
    if (np.diff(edges.reshape(-1, HISTOGRAM_BINS + 1), axis=1) <= 0).any():
        fail(path, "the edges of a magnitude histogram are not ascending")
    totals = np.zeros(len(rows), dtype=np.int64)
    np.add.at(totals, owners, histogram)
    limits = rows["width"].to_numpy()
    # A note says how many values were not finite; without one the histogram holds every neuron.
    complete = pc.equal(rows["note"], "").to_numpy()
    if (totals > limits).any() or (totals[complete] != limits[complete]).any():
        fail(path, "a magnitude histogram does not add up to the number of neurons of its block")


def _check_logs(path: Path, rows: pa.Table) -> None:
    column = rows["metrics"].combine_chunks()
    flat = column.flatten()
    parts = [flat.field("name"), flat.field("value")]
    if column.null_count or flat.null_count or any(part.null_count for part in parts):
        fail(path, "a row of logged numbers has no name or no value")
    if _longest(parts[0]) > MAX_NAME:
        fail(path, f"a logged number has a name of more than {MAX_NAME} characters")


def _check_overtrainings(path: Path, table: pa.Table) -> None:
    rows = rows_of_kind(table, "overtraining")
    _check_logs(path, rows)
    found = metric_values(table, "overtraining")
    if any(len(found.get(name, ((), ()))[1]) != len(rows) for name in OVERTRAINING_METRICS):
        fail(path, "an overtraining does not say all that is recorded of it")
    for name in ("batches", "skipped", "samples", "tokens", "neurons") if len(rows) else ():
        values = found[name][1]
        if not (np.isfinite(values) & (values >= 0) & (values < 2**53) & (values % 1 == 0)).all():
            fail(path, f"{name} of an overtraining is not a whole number from 0")


def _check_activities(path: Path, table: pa.Table, blocks: Blocks) -> None:
    rows = rows_of_kind(table, "activity")
    block_codes(path, rows, blocks)
    _check_logs(path, rows)
    found = metric_values(table, "activity")
    if any(len(found.get(name, ((), ()))[1]) != len(rows) for name in ACTIVITY_METRICS):
        fail(path, "an activity does not say all that is recorded of it")
    if len(rows):
        neurons, dead, dormant = (found[name][1] for name in ACTIVITY_METRICS)
        ascending = (dead >= 0) & (dead <= dormant) & (dormant <= neurons) & (neurons <= rows["width"].to_numpy())
        if not (ascending & (dead % 1 == 0) & (dormant % 1 == 0) & (neurons % 1 == 0)).all():
            fail(path, "an activity counts neurons that its block does not have")


def _check_notes(path: Path, rows: pa.Table) -> None:
    no_nulls(path, rows, "note")
    if (longest := _longest(rows["note"])) > MAX_NOTE:
        fail(path, f"it holds a note of {longest:,} characters")


def _whole_numbers(path: Path, rows: pa.Table, column: str, least: int) -> np.ndarray:
    """A column of whole numbers as int64, none missing or below `least`."""
    no_nulls(path, rows, column)
    values = rows[column].to_numpy().astype(np.int64)
    if (values < least).any():
        fail(path, f"{column} holds {int(values.min())} where a number from {least} is expected")
    return values


def _longest(texts: pa.ChunkedArray | pa.Array) -> int:
    return pc.max(pc.utf8_length(texts)).as_py() or 0
