"""That a run's own history has the shape it was written with, and tells the same story as the state and the summary.

Files that others wrote are held to more, see `hub.checks`. Everything is done column-wise, so a history of a million
rows takes about a second.
"""

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
    table = with_widths(path, table, blocks)
    for kind, column in (("phase", "recycled"), ("pruning", "pruned")):
        rows = rows_of_kind(table, kind)
        block_codes(path, rows, blocks)
        _, owners, neurons = list_column(path, rows, column)
        limits = rows["width"].to_numpy()[owners]
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
    told = _told(folder, blocks, with_widths(folder, table, blocks))
    for kind, source in (
        ("counts", "phases"),
        ("last_phase", "phases"),
        ("last_step", "phases"),
        ("pruned", "prunings"),
    ):
        for block, values in zip(blocks, told[kind], strict=True):
            name = block["name"]
            state = tensors.get(f"{name}/{kind}", torch.zeros(block["num_neurons"], dtype=torch.bool))
            if not np.array_equal(values, state.numpy()):
                fail(folder, f"{kind} of block {name} in the state contradicts the {source} of the history")
    totals = overtraining_totals(table)
    for name in ("samples", "tokens"):
        if totals[name] != int(tensors.get(f"trainer/overtrain_{name}", torch.zeros(1)).sum()):
            fail(folder, f"overtrain_{name} in the state contradicts the overtrainings of the history")
    if stats is not None:
        _check_summary(folder, blocks, table, tensors, stats)


def _told(folder: Path, blocks: Sequence[Mapping[str, Any]], table: pa.Table) -> dict[str, list[np.ndarray]]:
    """What a history with widths says of every neuron, as in the state: for each block an array `(d_ff,)`."""
    resizes = table["resizes"].to_numpy()
    names = {block["name"]: number for number, block in enumerate(blocks)}
    first = {row["block"]: row["eligible"] for row in reversed(rows_of_kind(table, "resize").to_pylist())}
    sizes = [first.get(block["name"], block["num_neurons"]) for block in blocks]
    told = {kind: [np.zeros(size, dtype=np.int64) for size in sizes] for kind in ("counts", "last_phase", "last_step")}
    told["pruned"] = [np.zeros(size, dtype=bool) for size in sizes]
    latest = 1
    for era in range(int(resizes.max(initial=0)) + 1):
        here = table.filter(pa.array(resizes == era))
        phases = rows_of_kind(here, "phase")
        starts = np.cumsum([0, *map(len, told["counts"])])
        whole = {kind: np.concatenate(values) for kind, values in told.items()} if len(blocks) else {}
        for rows, column in ((phases, "recycled"), (rows_of_kind(here, "pruning"), "pruned")) if whole else ():
            lengths, owners, neurons = list_column(folder, rows, column)
            places = starts[block_codes(folder, rows, blocks)[owners]] + neurons
            if column == "pruned":
                whole["pruned"][places] = True
                continue
            whole["counts"] += np.bincount(places, minlength=starts[-1])
            for kind, source in (("last_phase", "phase"), ("last_step", "step")):
                np.maximum.at(whole[kind], places, np.repeat(rows[source].to_numpy(), lengths))
        told = {kind: np.split(values, starts[1:-1]) for kind, values in whole.items()}
        done = phases["phase"].to_numpy()[~were_skipped(phases)]
        latest = max(latest, int(done.max(initial=0)))
        for row in rows_of_kind(here, "resize").to_pylist():
            number, former = names[row["block"]], np.array(row["recycled"])
            born = {"last_phase": latest, "last_step": row["step"]}
            for kind, values in told.items():
                values[number] = np.where(former < 0, born.get(kind, 0), values[number][former]).astype(
                    values[number].dtype
                )
    return told


def with_widths(path: Path, table: pa.Table, blocks: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A history with two more columns: `width`, how many neurons the row's block had then (0 for a row of no block),
    and `resizes`, how many times the model had been given another width (by rows that stand together)."""
    codes = pc.fill_null(pc.index_in(table["block"], pa.array([block["name"] for block in blocks], pa.string())), -1)
    places = codes.to_numpy().astype(np.int64)
    now = np.array([*(block["num_neurons"] for block in blocks), 0], dtype=np.int64)
    widths = now[places]
    is_resize = pc.equal(table["kind"], "resize").to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(is_resize)
    for row in reversed(rows.tolist()):
        step, block, before, former, requested = (
            table[name][row].as_py() for name in ("step", "block", "eligible", "recycled", "requested")
        )
        code = int(places[row])
        if code < 0:
            fail(path, f"it tells of a block {block!r:.60} that the config does not list")
        known = isinstance(before, int) and isinstance(former, list) and before > 0 and step is not None
        if not known or len(former) != now[code] or requested != now[code]:
            fail(path, f"a resize of block {block} at step {step} does not lead to the neurons that the block has")
        kept = np.array([index for index in former if index is None or index >= 0], dtype=np.float64)
        if not (np.isin(kept, np.arange(before)).all() and len(np.unique(kept)) == len(kept)) or min(former) < -1:
            fail(path, f"a resize of block {block} at step {step} names neurons that it did not have, or one twice")
        now[code] = before
        widths[:row][places[:row] == code] = before
    ends = is_resize & ~np.append(is_resize[1:], False) if len(is_resize) else is_resize
    resizes = np.cumsum(ends) - ends
    return table.append_column("width", pa.array(widths)).append_column("resizes", pa.array(resizes))


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
