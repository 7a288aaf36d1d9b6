"""Figures of analyses, as PNG files."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.analysis.labels import short_labels
from hf_recycle.analysis.model import ModelAnalysis
from hf_recycle.plots.run import draw_figures
from hf_recycle.plots.style import line_style, new_figure, open_axes, save
from hf_recycle.records.naming import short_names

_BINS = 60


def draw_analyses(analyses: Sequence[ModelAnalysis], folder: Path) -> list[Path]:
    """Draws `magnitudes.png` (a histogram for each layer) and `layers.png` (quantiles over the layers), all models in
    each, into `folder`, which is made if missing; and into a folder below it, for each model with recycling files, the
    figures of its history. Returns the paths."""
    figures = {"magnitudes.png": magnitudes_figure(analyses), "layers.png": layers_figure(analyses)}
    paths = [save(figure, folder / name) for name, figure in figures.items()]
    for analysis, label in zip(analyses, short_labels([a.label for a in analyses]), strict=True):
        if analysis.history is not None:
            paths += draw_figures(analysis.history, folder / re.sub(r"[^\w.-]+", "-", label).strip("-."))
    return paths


def magnitudes_figure(analyses: Sequence[ModelAnalysis]) -> Figure:
    """One panel per layer: the histogram of neuron magnitudes, of all models."""
    count = max(len(analysis.blocks) for analysis in analyses)
    columns = min(count, 3 if count <= 9 else 4 if count <= 16 else 6)
    rows = -(-count // columns)
    figure = new_figure(max(7.0, 2.7 * columns + 0.6), max(3.6, 1.9 * rows + 1.5))
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    edges = np.linspace(*_limits(analyses), _BINS + 1)
    titles = _titles(analyses, count)
    labels = short_labels([analysis.label for analysis in analyses])
    for position, panel in enumerate(panels.ravel()):
        if position >= count:
            panel.set_visible(False)
            above = panels[-2, position % columns]
            above.tick_params(labelbottom=True)
            above.set_xlabel("magnitude", fontsize=9)
            continue
        for number, (analysis, label) in enumerate(zip(analyses, labels, strict=True)):
            if position < len(analysis.blocks):
                _histogram(panel, analysis.blocks[position].magnitudes, edges, number, label, alone=len(analyses) == 1)
        _tidy(panel, titles[position])
    _legend(figure, panels[0, 0], len(analyses))
    what = f" of {labels[0]}" if len(analyses) == 1 else ""
    figure.suptitle(f"Magnitudes ‖w_in‖ · ‖w_out‖ of feed-forward neurons{what}, by layer", fontsize=12)
    for panel in panels[-1]:
        panel.set_xlabel("magnitude", fontsize=9)
    figure.supylabel("share of the layer's neurons", fontsize=10)
    return figure


def layers_figure(analyses: Sequence[ModelAnalysis]) -> Figure:
    """Median magnitude over the layers, with the middle 90% of the neurons shaded."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    labels = short_labels([analysis.label for analysis in analyses])
    for number, (analysis, label) in enumerate(zip(analyses, labels, strict=True)):
        layers = np.arange(len(analysis.blocks))
        quantiles = [block.quantiles for block in analysis.blocks]
        low, middle, high = ([q[level] for q in quantiles] for level in ("0.05", "0.5", "0.95"))
        style = line_style(number)
        axes.plot(layers, middle, label=label, marker="o", ms=4, lw=1.8, **style)
        axes.fill_between(layers, low, high, color=style["color"], alpha=0.15, lw=0)
        if len(layers) == 1:
            axes.vlines(layers, low, high, color=style["color"], alpha=0.4, lw=6)
    axes.set(xlabel="feed-forward block, in the model's order", ylabel="magnitude  ‖w_in‖ · ‖w_out‖")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(frameon=False)
    axes.set_title("Magnitude of neurons over the layers: median, and the middle 90% of the neurons")
    open_axes(axes)
    return figure


def _histogram(panel: Axes, values: np.ndarray, edges: np.ndarray, number: int, label: str, alone: bool) -> None:
    # What lies beyond the common range is counted in the outermost bins: nothing drops out of sight.
    inside = np.clip(values.astype(np.float64), edges[0], edges[-1])
    shares = np.histogram(inside, edges)[0] / len(values)
    style = line_style(number)
    panel.stairs(shares, edges, label=label, lw=1.3, **style)
    panel.stairs(shares, edges, fill=True, color=style["color"], alpha=0.45 if alone else 0.15)


def _limits(analyses: Sequence[ModelAnalysis]) -> tuple[float, float]:
    """One range of magnitudes for all panels; a few far neurons must not flatten the rest."""
    ends = [np.quantile(block.magnitudes, (0.002, 0.995)) for analysis in analyses for block in analysis.blocks]
    low, high = float(min(end[0] for end in ends)), 1.05 * float(max(end[1] for end in ends))
    low = 0.0 if low < 0.4 * high else 0.95 * low
    return (low, high) if high > low else (low, low + 1.0)


def _titles(analyses: Sequence[ModelAnalysis], count: int) -> list[str]:
    deepest = next(analysis for analysis in analyses if len(analysis.blocks) == count)
    names = [block.name for block in deepest.blocks]
    if any([block.name for block in a.blocks] != names[: len(a.blocks)] for a in analyses):
        return [f"block {position}" for position in range(count)]
    return list(short_names(names, width=26).values())


def _tidy(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    panel.grid(alpha=0.25, lw=0.6)
    open_axes(panel)


def _legend(figure: Figure, panel: Axes, models: int) -> None:
    if models > 1:
        handles, labels = panel.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, models), frameon=False, fontsize=9)
