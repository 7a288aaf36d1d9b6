"""Figures of a repository's revisions, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.analysis.revisions import RevisionState
from hf_recycle.plots.style import PALETTE, new_figure, open_axes, save
from hf_recycle.records.naming import short_names


def draw_revisions(states: Sequence[RevisionState], folder: Path) -> list[Path]:
    """Draws `revision_magnitudes.png` and, where neurons were recycled, `revision_counts.png` into `folder`. Returns
    the paths."""
    paths = [save(revision_magnitudes_figure(states), folder / "revision_magnitudes.png")]
    if any(sum(state.times_recycled.values()) for state in states):
        paths.append(save(revision_counts_figure(states), folder / "revision_counts.png"))
    return paths


def revision_magnitudes_figure(states: Sequence[RevisionState]) -> Figure:
    """One panel per block: median magnitude, the middle 50% and the middle 98% of the neurons, over the revisions."""
    blocks = list(states[-1].quantiles)
    columns = min(len(blocks), 3 if len(blocks) <= 9 else 4)
    rows = -(-len(blocks) // columns)
    figure = new_figure(max(7.0, 3.0 * columns + 0.6), max(3.8, 2.1 * rows + 1.4))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    names = short_names(blocks, width=26)
    for panel, block in zip(panels.ravel(), blocks, strict=False):
        places = [x for x, state in zip(_places(states), states, strict=True) if state.quantiles.get(block)]
        levels = [state.quantiles[block] for state in states if state.quantiles.get(block)]
        for low, high, alpha in (("0.01", "0.99", 0.15), ("0.25", "0.75", 0.3)):
            ends = ([quantiles[level] for quantiles in levels] for level in (low, high))
            label = f"middle {100 * (float(high) - float(low)):.0f}%"
            panel.fill_between(places, *ends, color=PALETTE[0], alpha=alpha, lw=0, label=label)
        medians = [quantiles["0.5"] for quantiles in levels]
        panel.plot(places, medians, color=PALETTE[0], marker="o", ms=3.5, label="median")
        panel.set_title(names[block], fontsize=9)
        panel.set_ylim(bottom=0)
        _tidy(panel, states)
    for panel in panels.ravel()[len(blocks) :]:
        panel.set_visible(False)
        panels[-2, panel.get_subplotspec().colspan.start].tick_params(labelbottom=True)
    panels[0, 0].legend(fontsize=7, framealpha=0.7)
    figure.suptitle("Magnitudes of feed-forward neurons over the revisions, by block", fontsize=12)
    figure.supxlabel(_axis_name(states), fontsize=10)
    figure.supylabel("magnitude  ‖w_in‖ · ‖w_out‖", fontsize=10)
    return figure


def revision_counts_figure(states: Sequence[RevisionState]) -> Figure:
    """How often a neuron was recycled on average, by block, over the revisions."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    blocks = list(states[-1].times_recycled)
    names = short_names(blocks, width=26)
    colours = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(blocks)))
    for block, colour in zip(blocks, colours, strict=True):
        points = [
            (x, state.times_recycled[block])
            for x, state in zip(_places(states), states, strict=True)
            if block in state.times_recycled
        ]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=4, label=names[block])
    axes.set(xlabel=_axis_name(states), ylabel="times recycled, mean over the block's neurons")
    axes.set_ylim(bottom=0)
    axes.set_title("Recycling of feed-forward neurons over the revisions, by block")
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(blocks) // 13)
    _tidy(axes, states)
    return figure


def _places(states: Sequence[RevisionState]) -> list[int]:
    """Where on the axis each revision stands: at its step, or one after the other where a step is unknown."""
    steps = [state.step for state in states]
    return list(range(len(states))) if None in steps else [step for step in steps if step is not None]


def _axis_name(states: Sequence[RevisionState]) -> str:
    return "revision" if any(state.step is None for state in states) else "optimizer steps"


def _tidy(axes: Axes, states: Sequence[RevisionState]) -> None:
    axes.grid(alpha=0.25, lw=0.6)
    axes.tick_params(labelsize=8)
    open_axes(axes)
    if _axis_name(states) == "revision" and len(states) <= 12:
        axes.set_xticks(range(len(states)), [state.name for state in states], rotation=45, ha="right")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
