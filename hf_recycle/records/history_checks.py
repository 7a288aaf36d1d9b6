"""That a run's own history has the shape it was written with, and tells the same story as the state and the summary.

Files that others wrote are held to more, see `hub.checks`. Everything is done column-wise, so a history of a million
rows takes about a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hf_recycle.records.file_checks import fail
from hf_recycle.records.recorder import HISTORY_SCHEMA, KINDS, overtraining_totals, rows_of_kind, were_skipped


def check_history(path: Path, table: pa.Table, blocks: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Check a history's columns; with the config's `blocks`, also that its rows name neurons that these have."""
    if not table.schema.equals(HISTORY_SCHEMA):
        fail(path, "its columns are not those of a recycling history")
    kinds = set(pc.unique(table["kind"]).to_pylist())
    if not kinds <= set(KINDS):
        fail(path, f"kind holds {sorted(map(str, kinds))} where {', '.join(KINDS)} are expected")
    if blocks is None:
        return
    for kind, column in (("phase", "recycled"), ("pruning", "pruned")):
        rows = rows_of_kind(table, kind)
        codes = block_codes(path, rows, blocks)
        _, owners, neurons = list_column(path, rows, column)
        limits = np.array([block["num_neurons"] for block in blocks], dtype=np.int64)[codes[owners]]
        if (neurons < 0).any():
            fail(path, f"a {kind} holds a neuron with a negative index")
        if (neurons >= limits).any():
            fail(path, f"a {kind} names more neurons than its block has")


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
    blocks = config["blocks"]
    _check_phases(folder, blocks, rows_of_kind(table, "phase"), tensors)
    _check_prunings(folder, blocks, rows_of_kind(table, "pruning"), tensors)
    totals = overtraining_totals(table)
    for name in ("samples", "tokens"):
        if totals[name] != int(tensors.get(f"trainer/overtrain_{name}", torch.zeros(1)).sum()):
            fail(folder, f"overtrain_{name} in the state contradicts the overtrainings of the history")
    if stats is not None:
        _check_summary(folder, blocks, table, tensors, stats)


def _check_phases(
    folder: Path, blocks: Sequence[Mapping[str, Any]], rows: pa.Table, tensors: Mapping[str, torch.Tensor]
) -> None:
    neurons, lengths = _neurons(folder, blocks, rows, "recycled")
    total = sum(block["num_neurons"] for block in blocks)
    expected = {"counts": np.bincount(neurons, minlength=total)}
    for kind, column in (("last_phase", "phase"), ("last_step", "step")):
        expected[kind] = np.zeros(total, dtype=np.int64)
        np.maximum.at(expected[kind], neurons, np.repeat(rows[column].to_numpy(), lengths))
    for kind, values in expected.items():
        if name := _first_difference(blocks, values, lambda block, kind=kind: tensors[f"{block}/{kind}"]):
            fail(folder, f"{kind} of block {name} in the state contradicts the phases of the history")


def _check_prunings(
    folder: Path, blocks: Sequence[Mapping[str, Any]], rows: pa.Table, tensors: Mapping[str, torch.Tensor]
) -> None:
    neurons, _ = _neurons(folder, blocks, rows, "pruned")
    pruned = np.bincount(neurons, minlength=sum(block["num_neurons"] for block in blocks)) > 0
    sizes = {block["name"]: block["num_neurons"] for block in blocks}
    if name := _first_difference(
        blocks, pruned, lambda block: tensors.get(f"{block}/pruned", torch.zeros(sizes[block], dtype=torch.bool))
    ):
        fail(folder, f"pruned of block {name} in the state contradicts the prunings of the history")


def _check_summary(
    folder: Path,
    blocks: Sequence[Mapping[str, Any]],
    table: pa.Table,
    tensors: Mapping[str, torch.Tensor],
    stats: Mapping[str, Any],
) -> None:
    if "overtraining" in stats and stats["overtraining"] != overtraining_totals(table):
        fail(folder, "overtraining in the summary contradicts the history")
    latest = max((int(tensors[f"{block['name']}/last_step"].max()) for block in blocks), default=0)
    if stats["step"] < latest:
        fail(folder, f"the summary was made at step {stats['step']}, before the last recycling at {latest}")
    rows = rows_of_kind(table, "phase")
    if stats["phases"] != len(pc.unique(rows["phase"].filter(~were_skipped(rows)))):
        fail(folder, f"the summary counts {stats['phases']} phases and the history holds others")
    if [block["name"] for block in stats["blocks"]] != [block["name"] for block in blocks]:
        fail(folder, "the blocks of the summary are not those of the config")
    for block in stats["blocks"]:
        times, numbers = np.unique(tensors[f"{block['name']}/counts"].numpy(), return_counts=True)
        found = {int(key): number for key, number in block["times_recycled"].items() if number}
        if block["pruned"] != int(tensors.get(f"{block['name']}/pruned", torch.zeros(0)).sum()):
            fail(folder, f"pruned of block {block['name']} in the summary contradicts the state")
        if found != dict(zip(times.tolist(), numbers.tolist(), strict=True)):
            fail(folder, f"times_recycled of block {block['name']} in the summary contradicts the state")


def _neurons(
    folder: Path, blocks: Sequence[Mapping[str, Any]], rows: pa.Table, column: str
) -> tuple[np.ndarray, np.ndarray]:
    """The neurons in a column of lists, numbered over all blocks `(n,)`, and how many each row names `(rows,)`."""
    first = np.cumsum([0, *(block["num_neurons"] for block in blocks)])
    lengths, owners, neurons = list_column(folder, rows, column)
    return first[block_codes(folder, rows, blocks)[owners]] + neurons, lengths


def _first_difference(blocks: Sequence[Mapping[str, Any]], values: np.ndarray, state_of: Any) -> str | None:
    """The first block of whose neurons the history says something else than the state; None if they agree."""
    at = 0
    for block in blocks:
        name, size = block["name"], block["num_neurons"]
        if not np.array_equal(values[at : at + size], state_of(name).numpy()):
            return name
        at += size
    return None


def block_codes(path: Path, rows: pa.Table, blocks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Which of the config's blocks each row tells of, as its place in their list: int64 `(rows,)`."""
    no_nulls(path, rows, "block")
    codes = pc.index_in(rows["block"], pa.array([block["name"] for block in blocks], pa.string()))
    if codes.null_count:
        unknown = rows["block"].filter(pc.is_null(codes))[0].as_py()
        fail(path, f"it tells of a block {unknown!r:.60} that the config does not list")
    return codes.to_numpy().astype(np.int64)


def list_column(path: Path, rows: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of lists as the length of each (rows,), and owner row and value of each entry."""
    no_nulls(path, rows, column)
    lists = rows[column].combine_chunks()
    flat = lists.flatten()
    if flat.null_count:
        fail(path, f"{column} has lists with missing values")
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    owners = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, owners, flat.to_numpy(zero_copy_only=False)


def no_nulls(path: Path, rows: pa.Table, column: str) -> None:
    """Refuse a column with missing values."""
    if rows[column].null_count:
        fail(path, f"{column} is missing in {rows[column].null_count} rows")
