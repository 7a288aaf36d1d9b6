"""Analyses as text for a terminal."""

from collections.abc import Callable, Sequence

import numpy as np

from hf_recycle.analysis.blocks import BIMODAL_P, BlockStatistics
from hf_recycle.analysis.labels import short_labels
from hf_recycle.analysis.model import ModelAnalysis
from hf_recycle.records.naming import short_names
from hf_recycle.records.times import group_times

LEGEND = f"""\
magnitude: ‖w_in‖·‖w_out‖ of a neuron. CV: standard deviation over mean. dip: Hartigan's dip of the magnitudes; p: of
the test for one mode (two or more where p < {BIMODAL_P:g}). dead: magnitude zero, or far below the median. dup.: in-row
and out-column nearly parallel to those of an earlier neuron."""


def analysis_text(analyses: Sequence[ModelAnalysis]) -> str:
    """A table for each model, and one that sets several side by side."""
    parts = [_model(analysis) for analysis in analyses]
    if len(analyses) > 1:
        parts.append(_side_by_side(analyses))
    return "\n\n".join([*parts, LEGEND])


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of cells in aligned columns, the first to the left, the others to the right; the first is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _model(analysis: ModelAnalysis) -> str:
    names = short_names([block.name for block in analysis.blocks])
    rows: list[tuple[str, ...]] = [
        ("block", "neurons", "1%", "median", "99%", "mean", "CV", "dip", "p", "dead", "dup.")
    ]
    rows += [_block(names[block.name], block) for block in analysis.blocks]
    heading = (
        f"{analysis.label}: {analysis.architecture}, {analysis.neurons:,} neurons in {len(analysis.blocks)} "
        f"feed-forward block{'s' * (len(analysis.blocks) != 1)}"
    )
    return "\n".join([heading, table(rows), *_recycling(analysis)])


def _block(name: str, block: BlockStatistics) -> tuple[str, ...]:
    quantiles = block.quantiles
    return (
        name,
        f"{len(block.magnitudes):,}",
        *(f"{quantiles[level]:.3g}" for level in ("0.01", "0.5", "0.99")),
        f"{block.mean:.3g}",
        f"{block.variation:.3f}",
        f"{block.dip:.4f}",
        f"{block.dip_p:.3f}{'*' if block.bimodal else ' '}",
        f"{len(block.dead):,}",
        f"{len(block.duplicate):,}",
    )


def _recycling(analysis: ModelAnalysis) -> list[str]:
    history = analysis.history
    if history is None:
        return []
    neurons = history.stats["neurons"]
    total, ever, step = neurons["total"], neurons["ever_recycled"], history.stats["step"]
    lines = [
        f"  recycling, up to step {step:,}: {ever:,} of {total:,} neurons at least once ({100 * ever / total:.1f}%)"
    ]
    if ever:
        counts = np.concatenate(list(history.counts.values()))
        times = ", ".join(f"{group.label}: {group.count(counts):,}" for group in group_times(counts, 8))
        ages = np.concatenate(list(history.ages.values()))
        median = np.median(ages[ages >= 0])
        lines.append(f"  times recycled: {times}; median age {median:,.0f} steps")
    return lines


def _side_by_side(analyses: Sequence[ModelAnalysis]) -> str:
    def total(count: Callable[[BlockStatistics], int]) -> list[str]:
        return [f"{sum(map(count, a.blocks)):,}" for a in analyses]

    def pooled(level: float) -> list[str]:
        return [f"{np.quantile(np.concatenate([b.magnitudes for b in a.blocks]), level):.3g}" for a in analyses]

    rows = [
        ("", *short_labels([a.label for a in analyses])),
        ("blocks", *(str(len(a.blocks)) for a in analyses)),
        ("neurons", *total(lambda b: len(b.magnitudes))),
        ("magnitude, 1%", *pooled(0.01)),
        ("magnitude, median", *pooled(0.5)),
        ("magnitude, 99%", *pooled(0.99)),
        ("CV, mean of blocks", *(f"{np.mean([b.variation for b in a.blocks]):.3f}" for a in analyses)),
        ("blocks with p < " + f"{BIMODAL_P:g}", *total(lambda b: int(b.bimodal))),
        ("dead neurons", *total(lambda b: len(b.dead))),
        ("duplicate neurons", *total(lambda b: len(b.duplicate))),
    ]
    return "Side by side\n" + table(rows)
