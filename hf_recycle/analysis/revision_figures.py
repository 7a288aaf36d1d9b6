"""Figures of a repository's revisions, as PNG and SVG files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.analysis.revisions import RevisionState
from hf_recycle.plots.magnitudes import MAGNITUDE
from hf_recycle.plots.style import BLUE, SMALL, add_legend, block_panels, line_style, one_panel, save
from hf_recycle.plots.svg import hover
from hf_recycle.records.naming import short_names


def draw_revisions(states: Sequence[RevisionState], folder: Path) -> list[Path]:
    """Draws `revision_magnitudes` and, where neurons were recycled, `revision_counts` into `folder`.

    Returns:
        The paths.
    """
    paths = save(revision_magnitudes_figure(states), folder / "revision_magnitudes")
    if any(sum(state.times_recycled.values()) for state in states):
        paths += save(revision_counts_figure(states), folder / "revision_counts")
    return paths


def revision_magnitudes_figure(states: Sequence[RevisionState]) -> Figure:
    """One panel per block: median magnitude, the middle 50% and the middle 98% of the neurons, over the revisions."""
    blocks = list(states[-1].quantiles)
    title, names = "Magnitudes of feed-forward neurons over the revisions, by block", _names(states)
    room = 0.2 + (max(0.0, 0.065 * max(map(len, names)) - 0.3) if names else 0.0)  # for the legend, and names on end
    figure, panels, _ = block_panels(blocks, title, "" if names else _axis_name(states), MAGNITUDE, bottom=room)
    for panel, block in zip(panels, blocks, strict=True):
        places = [x for x, state in zip(_places(states), states, strict=True) if state.quantiles.get(block)]
        levels = [state.quantiles[block] for state in states if state.quantiles.get(block)]
        for low, high, alpha in (("0.01", "0.99", 0.15), ("0.25", "0.75", 0.35)):
            ends = ([quantiles[level] for quantiles in levels] for level in (low, high))
            share = f"middle {100 * (float(high) - float(low)):.0f}% of the neurons"
            panel.fill_between(places, *ends, color=BLUE, alpha=alpha, lw=0, label=share)
        medians = [quantiles["0.5"] for quantiles in levels]
        panel.plot(places, medians, color=BLUE, marker="o", ms=2.5, lw=1.2, label="median")
        _name_revisions(panel, states)
    panels[0].set_ylim(bottom=0)  # of all, which share it
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=3, frameon=False, fontsize=SMALL)
    return figure


def revision_counts_figure(states: Sequence[RevisionState]) -> Figure:
    """How often a neuron was recycled on average, by block, over the revisions."""
    title = "Recycling of feed-forward neurons over the revisions, by block"
    figure, axes = one_panel(4.0, title, _axis_name(states), "times recycled, mean over the block")
    blocks = list(states[-1].times_recycled)
    names = short_names(blocks, width=26)
    for number, block in enumerate(blocks, start=1):
        points = [
            (x, state.times_recycled[block], state.name)
            for x, state in zip(_places(states), states, strict=True)
            if block in state.times_recycled
        ]
        places, times, revisions = zip(*points, strict=True)
        (line,) = axes.plot(places, times, label=names[block], **line_style(number, marker=True))
        hover(line, [f"{names[block]} at {name}: {value:.3g}" for name, value in zip(revisions, times, strict=True)])
    axes.set_ylim(bottom=0)
    _name_revisions(axes, states)
    add_legend(figure, axes)
    return figure


def _places(states: Sequence[RevisionState]) -> list[int]:
    """Where on the axis each revision stands: at its step, or one after the other where a step is unknown."""
    steps = [state.step for state in states]
    return list(range(len(states))) if None in steps else [step for step in steps if step is not None]


def _axis_name(states: Sequence[RevisionState]) -> str:
    return "revision" if any(state.step is None for state in states) else "optimizer steps"


def _names(states: Sequence[RevisionState]) -> list[str]:
    """What stands at the axis where steps are unknown and names have room."""
    return [state.name[:16] for state in states] if _axis_name(states) == "revision" and len(states) <= 12 else []


def _name_revisions(axes: Axes, states: Sequence[RevisionState]) -> None:
    if names := _names(states):
        axes.set_xticks(range(len(states)), names, rotation=90)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
