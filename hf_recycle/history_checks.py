"""What the history file must contain, and that it tells the same story as the state and the summary.

Everything is checked column-wise, so a history of a million rows takes about a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hf_recycle.file_checks import MAX_NAME, check_version, fail
from hf_recycle.parquet_footer import ParquetClaims
from hf_recycle.recorder import (
    HISTOGRAM_BINS,
    HISTORY_SCHEMA,
    KINDS,
    OVERTRAINING_METRICS,
    QUANTILE_LEVELS,
    metric_values,
    overtraining_totals,
    rows_of_kind,
    were_skipped,
)

MAX_ROWS = 5_000_000
"""Most rows a history may have: 24 blocks recycled at every one of 80,000 steps make two million."""

MAX_VALUES = 400_000_000
"""Most values one column may have, over all its lists."""

MAX_BYTES = 4 * 2**30
"""Most bytes the file may claim to hold once decompressed."""


def check_claims(path: Path, claims: ParquetClaims) -> None:
    """Refuse a history by what its footer claims, before any of its data is read."""
    version = claims.metadata.get("format_version", "")
    number = int(version) if version.isascii() and version.isdigit() and len(version) < 10 else version
    check_version(path, number, claims.metadata.get("package_version"))
    if claims.num_rows > MAX_ROWS:
        fail(path, f"it claims {claims.num_rows:,} rows and a history has at most {MAX_ROWS:,}")
    if sum(claims.row_group_rows) != claims.num_rows:
        fail(path, "its row groups do not add up to its number of rows")
    if max(claims.column_values, default=0) > MAX_VALUES:
        fail(path, f"a column claims more than {MAX_VALUES:,} values")
    if sum(claims.column_bytes) > MAX_BYTES:
        fail(path, f"it claims more than {MAX_BYTES // 2**30} GiB of data")


def check_history(path: Path, table: pa.Table, blocks: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Check a history's rows; with the config's `blocks`, also their names and numbers of neurons."""
    if not table.schema.equals(HISTORY_SCHEMA):
        fail(path, "its columns are not those of a recycling history")
    kinds = set(pc.unique(table["kind"]).to_pylist())
    if not kinds <= set(KINDS):
        fail(path, f"kind holds {sorted(map(str, kinds))} where {', '.join(KINDS)} are expected")
    _whole_numbers(path, table, "step", 0)
    sizes = None if blocks is None else {block["name"]: block["num_neurons"] for block in blocks}
    _check_phases(path, rows_of_kind(table, "phase"), sizes)
    _check_prunings(path, rows_of_kind(table, "pruning"), sizes)
    _check_magnitudes(path, rows_of_kind(table, "magnitude"), sizes)
    _check_logs(path, rows_of_kind(table, "log"))
    _check_overtrainings(path, table)


def _check_phases(path: Path, rows: pa.Table, sizes: Mapping[str, int] | None) -> None:
    names = _block_names(path, rows, sizes)
    _no_nulls(path, rows, "note")
    steps = _whole_numbers(path, rows, "step", 0)
    phases = _whole_numbers(path, rows, "phase", 1)
    requested = _whole_numbers(path, rows, "requested", 0)
    eligible = _whole_numbers(path, rows, "eligible", 0)
    lengths, owners, recycled = _lists(path, rows, "recycled")
    if (lengths > np.minimum(requested, eligible)).any():
        fail(path, "a phase recycled more neurons than were requested or eligible")
    if (recycled < 0).any():
        fail(path, "a phase recycled a neuron with a negative index")
    if sizes is not None and len(rows):
        limits = np.array([sizes[name] for name in names.to_pylist()], dtype=np.int64)
        if (eligible > limits).any() or (recycled >= limits[owners]).any():
            fail(path, "a phase names more neurons than its block has")
    if len(np.unique(owners * 2**32 + recycled)) < len(recycled):
        fail(path, "a phase recycled one neuron twice")
    codes = names.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    if len(np.unique(steps * 2**32 + codes)) < len(steps):
        fail(path, "a block has two rows for one phase")
    done = ~were_skipped(rows)
    if (lengths[~done] > 0).any():
        fail(path, "a phase that was skipped recycled neurons")
    pairs = np.unique(np.stack([phases, steps], axis=1)[done], axis=0)
    if (np.diff(pairs[:, 0]) == 0).any() or (np.diff(pairs[:, 1]) <= 0).any():
        fail(path, "the phases are not in the order of their steps")


def _check_prunings(path: Path, rows: pa.Table, sizes: Mapping[str, int] | None) -> None:
    names = _block_names(path, rows, sizes)
    _no_nulls(path, rows, "note")
    requested = _whole_numbers(path, rows, "requested", 0)
    eligible = _whole_numbers(path, rows, "eligible", 0)
    lengths, owners, pruned = _lists(path, rows, "pruned")
    if (lengths > np.minimum(requested, eligible)).any():
        fail(path, "more neurons were pruned than were requested or eligible")
    if (pruned < 0).any():
        fail(path, "a neuron with a negative index was pruned")
    if sizes is not None and len(rows):
        limits = np.array([sizes[name] for name in names.to_pylist()], dtype=np.int64)
        if (eligible > limits).any() or (pruned >= limits[owners]).any():
            fail(path, "more neurons were pruned than the block has")
    codes = names.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    if len(np.unique(codes[owners] * 2**32 + pruned)) < len(pruned):
        fail(path, "a neuron was pruned twice")


def _check_magnitudes(path: Path, rows: pa.Table, sizes: Mapping[str, int] | None) -> None:
    names = _block_names(path, rows, sizes)
    _no_nulls(path, rows, "note")
    lengths, _, quantiles = _lists(path, rows, "quantiles")
    bins, owners, histogram = _lists(path, rows, "histogram")
    ends, _, edges = _lists(path, rows, "edges")
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
    if sizes is not None and len(rows):
        totals = np.zeros(len(rows), dtype=np.int64)
        np.add.at(totals, owners, histogram)
        limits = np.array([sizes[name] for name in names.to_pylist()], dtype=np.int64)
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
        if not (np.isfinite(values) & (values >= 0) & (values % 1 == 0)).all():
            fail(path, f"{name} of an overtraining is not a whole number from 0")


def check_agreement(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    table: pa.Table,
    stats: Mapping[str, Any] | None = None,
) -> None:
    """Check that the state, the history and the summary of one checkpoint tell the same story.

    Every run counts from zero, also one that went on from a vanilla checkpoint, so the phases of the history
    add up to the counts of the state. Each part was checked by itself before.
    """
    rows = rows_of_kind(table, "phase")
    for block in config["blocks"]:
        name, size = block["name"], block["num_neurons"]
        mine = rows.filter(pc.equal(rows["block"], name))
        lengths, _, recycled = _lists(folder, mine, "recycled")
        expected = {"counts": np.bincount(recycled, minlength=size)}
        for kind, column in (("last_phase", "phase"), ("last_step", "step")):
            last = np.zeros(size, dtype=np.int64)
            np.maximum.at(last, recycled, np.repeat(mine[column].to_numpy(), lengths))
            expected[kind] = last
        for kind, values in expected.items():
            if not np.array_equal(values, tensors[f"{name}/{kind}"].numpy()):
                fail(folder, f"{kind} of block {name} in the state contradicts the phases of the history")
        _check_pruned(folder, name, size, table, tensors)
    totals = overtraining_totals(table)
    for name in ("samples", "tokens"):
        if totals[name] != int(tensors.get(f"trainer/overtrain_{name}", torch.zeros(1)).sum()):
            fail(folder, f"overtrain_{name} in the state contradicts the overtrainings of the history")
    if stats is None:
        return
    if "overtraining" in stats and stats["overtraining"] != totals:
        fail(folder, "overtraining in the summary contradicts the history")
    latest = max((int(tensors[f"{block['name']}/last_step"].max()) for block in config["blocks"]), default=0)
    if stats["step"] < latest:
        fail(folder, f"the summary was made at step {stats['step']}, before the last recycling at {latest}")
    if stats["phases"] != len(pc.unique(rows["phase"].filter(~were_skipped(rows)))):
        fail(folder, f"the summary counts {stats['phases']} phases and the history holds others")
    names = [block["name"] for block in config["blocks"]]
    if [block["name"] for block in stats["blocks"]] != names:
        fail(folder, "the blocks of the summary are not those of the config")
    for block in stats["blocks"]:
        times, numbers = np.unique(tensors[f"{block['name']}/counts"].numpy(), return_counts=True)
        found = {int(key): number for key, number in block["times_recycled"].items() if number}
        if block["pruned"] != int(tensors.get(f"{block['name']}/pruned", torch.zeros(0)).sum()):
            fail(folder, f"pruned of block {block['name']} in the summary contradicts the state")
        if found != dict(zip(times.tolist(), numbers.tolist(), strict=True)):
            fail(folder, f"times_recycled of block {block['name']} in the summary contradicts the state")


def _check_pruned(folder: Path, name: str, size: int, table: pa.Table, tensors: Mapping[str, torch.Tensor]) -> None:
    rows = rows_of_kind(table, "pruning")
    _, _, pruned = _lists(folder, rows.filter(pc.equal(rows["block"], name)), "pruned")
    expected = np.bincount(pruned, minlength=size) > 0
    found = tensors.get(f"{name}/pruned", torch.zeros(size, dtype=torch.bool)).numpy()
    if not np.array_equal(expected, found):
        fail(folder, f"pruned of block {name} in the state contradicts the prunings of the history")


def _block_names(path: Path, rows: pa.Table, sizes: Mapping[str, int] | None) -> pa.Array:
    _no_nulls(path, rows, "block")
    names = rows["block"].combine_chunks()
    if sizes is not None:
        unknown = [name for name in pc.unique(names).to_pylist() if name not in sizes]
        if unknown:
            fail(path, f"it tells of a block {unknown[0]!r:.60} that the config does not list")
    return names


def _whole_numbers(path: Path, rows: pa.Table, column: str, least: int) -> np.ndarray:
    """A column of whole numbers as int64, none missing or below `least`."""
    _no_nulls(path, rows, column)
    values = rows[column].to_numpy().astype(np.int64)
    if (values < least).any():
        fail(path, f"{column} holds {int(values.min())} where a number from {least} is expected")
    return values


def _lists(path: Path, rows: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of lists as the length of each (rows,), and owner row and value of each entry."""
    _no_nulls(path, rows, column)
    lists = rows[column].combine_chunks()
    flat = lists.flatten()
    if flat.null_count:
        fail(path, f"{column} has lists with missing values")
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    owners = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, owners, flat.to_numpy(zero_copy_only=False)


def _no_nulls(path: Path, rows: pa.Table, column: str) -> None:
    if rows[column].null_count:
        fail(path, f"{column} is missing in {rows[column].null_count} rows")


def _longest(texts: pa.Array) -> int:
    return pc.max(pc.utf8_length(texts)).as_py() or 0
