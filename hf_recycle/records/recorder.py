"""What happened during training, collected row by row while it happens."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

QUANTILE_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""The levels of every list of magnitude quantiles, in this order."""

HISTOGRAM_BINS = 64

SKIPPED = "skipped: "
"""How the note of a phase begins in which nothing was done, because a loss or a magnitude was not finite."""

LEFT_ALONE = "left alone: "
"""How the note of a phase begins that found too few neurons at or below the threshold to do anything."""

KINDS = ("phase", "pruning", "overtraining", "magnitude", "activity", "log", "resize")
"""The kinds of rows of a history."""

OVERTRAINING_METRICS = (
    "batches",
    "skipped",
    "samples",
    "tokens",
    "neurons",
    "learning_rate",
    "first_loss",
    "last_loss",
)
"""What is recorded of an overtraining: numbers of extra batches, of those skipped because a gradient was not finite, of
samples and tokens over all processes, of neurons trained; the learning rate after the warm-up; the losses of the first
and the last batch."""

ACTIVITY_METRICS = ("neurons", "dead", "dormant")
"""What is recorded of the activity of a block: how many neurons are not pruned, and how many of these are dead or
dormant, see `hf_recycle.methods.activity`."""

# One schema for all kinds of rows: a column that a kind does not use is null. Lists of structs rather than
# maps, which fewer readers of parquet understand.
HISTORY_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # one of KINDS
        ("step", pa.int64()),  # optimizer steps done
        ("block", pa.string()),
        ("phase", pa.int32()),  # from 1
        ("requested", pa.int32()),
        ("eligible", pa.int32()),  # of a resize: neurons before it
        ("recycled", pa.list_(pa.int32())),  # indices of neurons; of a resize see `HistoryRecorder.resize`
        ("pruned", pa.list_(pa.int32())),  # indices of neurons
        ("note", pa.string()),
        ("quantiles", pa.list_(pa.float32())),  # at QUANTILE_LEVELS
        ("histogram", pa.list_(pa.int32())),  # neurons per bin, HISTOGRAM_BINS of them
        ("edges", pa.list_(pa.float64())),  # HISTOGRAM_BINS + 1, ascending
        ("metrics", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
    ]
)

MAX_NOTE = 500
_MAX_CHUNKS = 32


@dataclass(frozen=True)
class BlockRecord:
    """What a selection phase or a pruning did in one block.

    Attributes:
        step: of the Trainer.
        block: name of the block.
        requested: neurons that the settings ask for, also of a skipped phase (in global scope: those of this block
            that were chosen; of a pruning: beyond those that were pruned before).
        eligible: neurons that could be chosen.
        chosen: indices of the neurons that were recycled or pruned, ascending.
        note: why fewer were chosen than requested, or empty; shortened to 500 characters in the history.
        edits: what else was changed, or empty; noted too.
        phase: number of the phase, from 1 (of a skipped phase: the number it would have had); None: a pruning.
    """

    step: int
    block: str
    requested: int
    eligible: int
    chosen: Sequence[int]
    note: str = ""
    edits: str = ""
    phase: int | None = None


class HistoryRecorder:
    """Collects the rows of `recycling_history.parquet` in memory.

    Rows become Arrow tables only when a table is asked for, and only those that came since: a checkpoint of a
    long run costs what happened since the last one.
    """

    def __init__(self) -> None:
        self._activity: dict[str, Mapping[str, float]] = {}
        self._table = HISTORY_SCHEMA.empty_table()
        self._pending: list[dict[str, Any]] = []

    def phase(self, record: BlockRecord) -> None:
        """Record what a selection phase did in one block."""
        self._chosen("recycled", record, kind="phase", phase=record.phase)

    def pruning(self, record: BlockRecord) -> None:
        """Record what a pruning did in one block."""
        self._chosen("pruned", record, kind="pruning")

    def _chosen(self, column: str, record: BlockRecord, **more: Any) -> None:
        self._pending.append(
            {
                **more,
                "step": int(record.step),
                "block": record.block,
                "requested": int(record.requested),
                "eligible": int(record.eligible),
                column: [int(index) for index in record.chosen],
                "note": "; ".join(filter(None, (record.note, record.edits)))[:MAX_NOTE],
            }
        )

    def resize(self, step: int, block: str, neurons: int, former: Sequence[int], note: str) -> None:
        """Record that a block has another number of neurons from here on: rows before and after count them apart.

        Args:
            step: optimizer steps done.
            block: name of the block.
            neurons: how many it had.
            former: for each neuron it has now, which one it was, -1 for one that was added.
            note: how they were chosen or made.
        """
        self._pending.append(
            {
                "kind": "resize",
                "step": int(step),
                "block": block,
                "requested": len(former),
                "eligible": int(neurons),
                "recycled": [int(index) for index in former],
                "note": note[:MAX_NOTE],
            }
        )

    def magnitudes(self, step: int, block: str, values: torch.Tensor) -> None:
        """Record the distribution of a block's neuron magnitudes: quantiles and a histogram over its range.

        Copies the tensor to the CPU once. Values that are not finite are left out and counted in the note;
        where no value is finite, the lists are empty.

        Args:
            step: optimizer steps done.
            block: name of the block.
            values: float tensor (d_ff,).
        """
        if values.dim() != 1:
            raise ValueError(f"magnitudes of block {block} have shape {tuple(values.shape)}, not (d_ff,)")
        everything = values.detach().to("cpu", torch.float32).numpy().astype(np.float64)
        finite = everything[np.isfinite(everything)]
        lost = len(everything) - len(finite)
        counts, edges = _histogram(finite)
        self._pending.append(
            {
                "kind": "magnitude",
                "step": int(step),
                "block": block,
                "note": f"{lost} of {len(everything)} magnitudes are not finite" if lost else "",
                "quantiles": magnitude_quantiles(finite) or [],
                "histogram": counts,
                "edges": edges,
            }
        )

    def overtraining(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one overtraining: `OVERTRAINING_METRICS` by name."""
        named = [{"name": name, "value": float(metrics[name])} for name in OVERTRAINING_METRICS]
        self._pending.append({"kind": "overtraining", "step": int(step), "note": "", "metrics": named})

    def activity(self, step: int, block: str, metrics: Mapping[str, float]) -> None:
        """Record how many neurons of a block a probe found idle: `ACTIVITY_METRICS` by name."""
        named = [{"name": name, "value": float(metrics[name])} for name in ACTIVITY_METRICS]
        self._pending.append({"kind": "activity", "step": int(step), "block": block, "note": "", "metrics": named})
        self._activity[block] = metrics

    def idle_shares(self) -> dict[str, float]:
        """Dead and dormant neurons of all blocks that were probed, over their neurons, each when it was probed last;
        empty before the first probe."""
        sums = {name: sum(each[name] for each in self._activity.values()) for name in ACTIVITY_METRICS}
        return {f"{name}_share": sums[name] / sums["neurons"] for name in ("dead", "dormant") if sums["neurons"]}

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Record the numbers of one `Trainer.log` call; what is not a plain number is left out."""
        metrics = [
            {"name": name, "value": float(value)}
            for name, value in logs.items()
            if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
        ]
        if metrics:
            self._pending.append({"kind": "log", "step": int(step), "note": "", "metrics": metrics})

    def to_table(self) -> pa.Table:
        """All rows so far, in the order they were recorded, with `HISTORY_SCHEMA`."""
        if self._pending:
            new = pa.Table.from_pylist(self._pending, schema=HISTORY_SCHEMA)
            self._table = pa.concat_tables([self._table, new])
            self._pending = []
            # Concatenation copies nothing, but a table of thousands of chunks is slow to write and to filter.
            if self._table["kind"].num_chunks > _MAX_CHUNKS:
                self._table = self._table.combine_chunks()
        return self._table

    @classmethod
    def from_table(cls, table: pa.Table) -> HistoryRecorder:
        """A recorder that goes on after the rows of `table`, which was checked by `files.read_history`."""
        if not table.schema.equals(HISTORY_SCHEMA):
            raise ValueError("the table does not have the columns of a recycling history")
        recorder = cls()
        recorder._table = table.replace_schema_metadata(None)
        recorder._activity = {row["block"]: row for row in activity_rows(table)}
        return recorder


def rows_of_kind(table: pa.Table, kind: str) -> pa.Table:
    """The rows of a history that record one of `KINDS`."""
    return table.filter(pc.equal(table["kind"], kind))


def were_skipped(phases: pa.Table) -> np.ndarray:
    """Which rows of kind "phase" are of phases that were skipped, bool `(n,)`. Those count for nothing: the phase that
    comes next has the number that they would have had."""
    return pc.starts_with(phases["note"], SKIPPED).fill_null(False).to_numpy()


def metric_values(table: pa.Table, kind: str = "log") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every number of the rows of a kind, those logged by default: {name: (steps int64 (n,), values float64 (n,))}, in
    the order recorded."""
    rows = rows_of_kind(table, kind).combine_chunks()
    column = rows["metrics"].combine_chunks()
    owners = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    steps = rows["step"].to_numpy()[owners]
    flat = column.flatten()
    names = flat.field("name").dictionary_encode()
    codes = names.indices.to_numpy(zero_copy_only=False)
    values = flat.field("value").to_numpy(zero_copy_only=False)
    return {
        name: (steps[codes == code], values[codes == code]) for code, name in enumerate(names.dictionary.to_pylist())
    }


def activity_rows(table: pa.Table) -> list[dict[str, Any]]:
    """What probes found: a row for each block and probe with `step`, `block` and `ACTIVITY_METRICS`."""
    rows = rows_of_kind(table, "activity")
    columns = {"step": rows["step"].to_pylist(), "block": rows["block"].to_pylist()}
    columns |= {name: values.astype(int).tolist() for name, (_, values) in metric_values(table, "activity").items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def overtraining_totals(table: pa.Table) -> dict[str, int]:
    """How many times a run was overtrained, and on how many extra batches, samples and tokens."""
    found = metric_values(table, "overtraining")
    steps, _ = found.get("batches", ((), ()))
    sums = {name: int(found[name][1].sum()) if name in found else 0 for name in ("batches", "samples", "tokens")}
    return {"times": len(steps), **sums}


def magnitude_quantiles(values: np.ndarray | torch.Tensor) -> list[float] | None:
    """Quantiles of the finite values at `QUANTILE_LEVELS`, or None when no value is finite."""
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    return [float(q) for q in np.quantile(finite, QUANTILE_LEVELS)] if len(finite) else None


def _histogram(values: np.ndarray) -> tuple[list[int], list[float]]:
    """Counts and edges of evenly spaced bins from the smallest to the largest of finite values."""
    if not len(values):
        return [], []
    low, high = float(values.min()), float(values.max())
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=0.0):
        high = low + max(abs(low) * 1e-3, 1e-12)  # bins need a width even when all neurons are equal
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=(low, high))
    return counts.tolist(), edges.tolist()
