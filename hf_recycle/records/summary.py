"""The summary of a run so far: the content of `recycling_stats.json`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from hf_recycle.records.recorder import (
    QUANTILE_LEVELS,
    HistoryRecorder,
    magnitude_quantiles,
    metric_values,
    overtraining_totals,
    rows_of_kind,
    were_skipped,
)


def summarize(
    counts: Mapping[str, torch.Tensor],
    magnitudes: Mapping[str, torch.Tensor],
    recorder: HistoryRecorder,
    *,
    step: int,
    pruned: Mapping[str, torch.Tensor] | None = None,
    fading_in: int = 0,
    immune: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Summarize what happened to the neurons, as JSON types (losses may be NaN: `write_stats` makes it null).

    Args:
        counts: {block: integer tensor (d_ff,)}, times recycled, in the model's order of blocks.
        magnitudes: {block: float tensor (d_ff,)}, the magnitudes now; may lack blocks.
        recorder: the run's records.
        step: optimizer steps done.
        pruned: {block: bool tensor (d_ff,)}; None: no neuron is pruned.
        fading_in: neurons being interpolated now.
        immune: neurons that can't be selected now.
        extra: more to store under `extra` (JSON types).
    """
    off = {name: int(mask.sum()) for name, mask in (pruned or {}).items()}
    blocks = [_block(name, block, magnitudes.get(name), off.get(name, 0)) for name, block in counts.items()]
    total = sum(block["neurons"] for block in blocks)
    ever = sum(block["ever_recycled"] for block in blocks)
    table = recorder.to_table()
    logged, phases = metric_values(table), rows_of_kind(table, "phase")
    summary = {
        "step": int(step),
        "phases": len(pc.unique(phases["phase"].filter(~were_skipped(phases)))),
        "neurons": {
            "total": total,
            "ever_recycled": ever,
            "share_ever_recycled": _share(ever, total),
            "pruned": sum(off.values()),
            "fading_in": int(fading_in),
            "immune": int(immune),
        },
        "recycling_events": sum(block["recycling_events"] for block in blocks),
        "times_recycled": times_recycled(counts),
        "overtraining": overtraining_totals(table),
        "losses": {name: _course(*logged[name], best=np.argmin) for name in ("loss", "eval_loss") if name in logged},
        "blocks": blocks,
        "extra": dict(extra or {}),
    }
    if "eval_accuracy" in logged:
        summary["eval_accuracy"] = _course(*logged["eval_accuracy"], best=np.argmax)
    return summary


def times_recycled(counts: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, int]:
    """How many neurons were recycled how often, over all blocks: {"0": n0, "1": n1, ...}, gaps left out."""
    merged = np.concatenate([np.zeros(0, np.int64), *(np.asarray(block) for block in counts.values())])
    times, neurons = np.unique(merged, return_counts=True)
    return {str(time): int(number) for time, number in zip(times, neurons, strict=True)}


def _block(name: str, counts: torch.Tensor, magnitudes: torch.Tensor | None, pruned: int) -> dict[str, Any]:
    counts = counts.detach().cpu()
    ever = int((counts > 0).sum())
    quantiles = None if magnitudes is None else magnitude_quantiles(magnitudes.detach().cpu().float())
    return {
        "name": name,
        "neurons": counts.numel(),
        "ever_recycled": ever,
        "share_ever_recycled": _share(ever, counts.numel()),
        "recycling_events": int(counts.sum()),
        "pruned": pruned,
        "times_recycled": times_recycled({name: counts}),
        "magnitude_quantiles": quantiles
        and {f"{level:g}": value for level, value in zip(QUANTILE_LEVELS, quantiles, strict=True)},
    }


def _course(steps: np.ndarray, values: np.ndarray, best: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """First, last and best value of a metric with their steps; the best is null when none is finite."""
    finite = np.flatnonzero(np.isfinite(values))
    at = finite[best(values[finite])] if len(finite) else None
    return {
        "first": float(values[0]),
        "first_step": int(steps[0]),
        "last": float(values[-1]),
        "last_step": int(steps[-1]),
        "best": None if at is None else float(values[at]),
        "best_step": None if at is None else int(steps[at]),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
