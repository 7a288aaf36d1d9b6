"""Figures of analyses, as PNG and SVG files."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.analysis.labels import short_labels
from hf_recycle.analysis.model import ModelAnalysis
from hf_recycle.plots.magnitudes import MAGNITUDE
from hf_recycle.plots.run import draw_figures
from hf_recycle.plots.style import SMALL, add_legend, block_panels, line_style, one_panel, percent, save
from hf_recycle.plots.svg import hover

_BINS = 60


def draw_analyses(analyses: Sequence[ModelAnalysis], folder: Path) -> list[Path]:
    """Draws `magnitudes` (a histogram for each layer) and `layers` (quantiles over the layers), all models in each,
    into `folder`, which is made if missing; and into a folder below it, for each model with recycling files, the
    figures of its history. Returns the paths."""
    figures = {"magnitudes": magnitudes_figure(analyses), "layers": layers_figure(analyses)}
    paths = [path for name, figure in figures.items() for path in save(figure, folder / name)]
    for analysis, label in zip(analyses, short_labels([a.label for a in analyses]), strict=True):
        if analysis.history is not None:
            paths += draw_figures(analysis.history, folder / re.sub(r"[^\w.-]+", "-", label).strip("-."))
    return paths


def magnitudes_figure(analyses: Sequence[ModelAnalysis]) -> Figure:
    """One panel per layer: the histogram of neuron magnitudes, of all models."""
    names = _block_names(analyses)
    labels = short_labels([analysis.label for analysis in analyses])
    what = f" of {labels[0]}" if len(analyses) == 1 else ""
    room = 0.22 * -(-len(analyses) // 2) if len(analyses) > 1 else 0.0
    title, share = f"Magnitudes of feed-forward neurons{what}, by layer", "share of the layer's neurons"
    figure, panels, _ = block_panels(names, title, MAGNITUDE, share, bottom=room)
    edges = np.linspace(*_limits(analyses), _BINS + 1)
    for position, panel in enumerate(panels):
        for number, (analysis, label) in enumerate(zip(analyses, labels, strict=True)):
            if position < len(analysis.blocks):
                _histogram(panel, analysis.blocks[position].magnitudes, edges, number, label, alone=len(analyses) == 1)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.yaxis.set_major_formatter(percent)
    panels[0].set_ylim(bottom=0)  # of all, which share it
    if len(analyses) > 1:
        handles = max((panel.get_legend_handles_labels() for panel in panels), key=lambda found: len(found[1]))
        figure.legend(*handles, loc="lower center", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def layers_figure(analyses: Sequence[ModelAnalysis]) -> Figure:
    """Median magnitude over the layers, with the middle 90% of the neurons shaded."""
    title = "Magnitude of neurons over the layers: median, and the middle 90% of the neurons"
    figure, axes = one_panel(3.6, title, "feed-forward block, in the model's order", MAGNITUDE)
    labels = short_labels([analysis.label for analysis in analyses])
    for number, (analysis, label) in enumerate(zip(analyses, labels, strict=True), start=1):
        layers = np.arange(len(analysis.blocks))
        quantiles = [block.quantiles for block in analysis.blocks]
        low, middle, high = ([q[level] for q in quantiles] for level in ("0.05", "0.5", "0.95"))
        style = line_style(number, marker=True)
        (line,) = axes.plot(layers, middle, label=label, **style)
        hover(line, [f"{block.name}: median {block.quantiles['0.5']:.4g}" for block in analysis.blocks])
        axes.fill_between(layers, low, high, color=style["color"], alpha=0.15, lw=0)
        if len(layers) == 1:
            axes.vlines(layers, low, high, color=style["color"], alpha=0.4, lw=6)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, axes)
    return figure


def _histogram(panel: Axes, values: np.ndarray, edges: np.ndarray, number: int, label: str, alone: bool) -> None:
    # What lies beyond the common range is counted in the outermost bins: nothing drops out of sight.
    inside = np.clip(values.astype(np.float64), edges[0], edges[-1])
    shares = np.histogram(inside, edges)[0] / len(values)
    style = line_style(number + 1)
    panel.stairs(
        shares, edges, label=label, **style | {"linewidth": 1.0, "linestyle": "-" if alone else style["linestyle"]}
    )
    panel.stairs(shares, edges, fill=True, color=style["color"], alpha=0.45 if alone else 0.15)


def _limits(analyses: Sequence[ModelAnalysis]) -> tuple[float, float]:
    """One range of magnitudes for all panels; a few far neurons must not flatten the rest."""
    ends = [np.quantile(block.magnitudes, (0.002, 0.995)) for analysis in analyses for block in analysis.blocks]
    low, high = float(min(end[0] for end in ends)), 1.05 * float(max(end[1] for end in ends))
    low = 0.0 if low < 0.4 * high else 0.95 * low
    return (low, high) if high > low else (low, low + 1.0)


def _block_names(analyses: Sequence[ModelAnalysis]) -> list[str]:
    """The names of the panels: those of the deepest model's blocks, or numbers where the models' names differ."""
    names = [block.name for block in max(analyses, key=lambda analysis: len(analysis.blocks)).blocks]
    if any([block.name for block in a.blocks] != names[: len(a.blocks)] for a in analyses):
        return [f"block {position}" for position in range(len(names))]
    return names
