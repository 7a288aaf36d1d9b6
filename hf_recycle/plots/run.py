"""The figures of a run, drawn from its `RecyclingHistory` alone.

They use matplotlib's Figure objects and no pyplot: nothing global changes, no window opens. Colours are the
Okabe-Ito palette and cividis, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.naming import short_names
from hf_recycle.records.recorder import QUANTILE_LEVELS
from hf_recycle.records.times import group_times

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_DPI = 110


def draw_figures(history: RecyclingHistory, folder: str | Path, *, unigram_entropy: float | None = None) -> list[Path]:
    """Draw the figures that `history` has data for, as PNG files in `folder` (made if missing): see `figure_images`.

    Returns:
        The paths of the figures drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = figure_images(history, unigram_entropy=unigram_entropy)
    for name, image in images.items():
        (folder / name).write_bytes(image)
    return [folder / name for name in images]


def figure_images(history: RecyclingHistory, *, unigram_entropy: float | None = None) -> dict[str, bytes]:
    """The figures that `history` has data for: {name of the file: PNG}.

    `loss.png`, `magnitudes.png`, `recycle_counts.png`, `ages.png`: a figure without data is left out.

    Args:
        history: what happened.
        unigram_entropy: entropy of the corpus's unigrams in nats, drawn as a line beside the losses.
    """
    drawings: dict[str, Callable[[], Figure | None]] = {
        "loss.png": lambda: loss_figure(history, unigram_entropy),
        "magnitudes.png": lambda: magnitudes_figure(history),
        "recycle_counts.png": lambda: recycle_counts_figure(history),
        "ages.png": lambda: ages_figure(history),
    }
    images = {}
    for name, draw in drawings.items():
        figure = draw()
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
            images[name] = buffer.getvalue()
    return images


def loss_figure(history: RecyclingHistory, unigram_entropy: float | None = None) -> Figure | None:
    """Training and evaluation loss over steps, with the selection phases marked; None without losses."""
    logs = history.logs
    curves: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        (label, logs.loc[np.isfinite(logs[column]), ["step", column]].to_numpy(), style)
        for column, label, style in (
            ("loss", "training", {"color": BLUE, "lw": 1.2}),
            ("eval_loss", "evaluation", {"color": ORANGE, "lw": 1.8, "marker": "o", "ms": 4}),
        )
        if column in logs
    ]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    figure, axes = _one_panel(8, 4.5)
    for label, points, style in curves:
        if len(points) == 1:
            style = {**style, "marker": "o"}  # one point makes no line
        axes.plot(points[:, 0], points[:, 1], label=label, **style)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=GREY, ls="--", lw=1.2, label="unigram entropy of the corpus")
    phases = np.unique(history.events["step"].to_numpy())
    if 0 < len(phases) <= 100:
        # Short marks on the axis: lines through the whole panel would hide the curves.
        axes.plot(
            phases,
            np.zeros(len(phases)),
            "|",
            color=GREEN,
            ms=9,
            mew=1.4,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="selection phase",
        )
    axes.set(xlabel="optimizer steps", ylabel="cross-entropy loss (nats per predicted token)")
    axes.set_title("Loss during training")
    axes.legend(frameon=False)
    return figure


def magnitudes_figure(history: RecyclingHistory) -> Figure | None:
    """One panel per block: histogram of neuron magnitudes over training; None without magnitudes."""
    records = history.magnitudes
    records = records[records["histogram"].map(len) > 0]
    blocks = [block for block in history.blocks if (records["block"] == block).any()]
    if not blocks:
        return None
    # One scale for all panels, so that blocks compare. A few far neurons must not flatten all of them.
    quantiles = np.array(records["quantiles"].to_list())
    high = 1.15 * quantiles[:, QUANTILE_LEVELS.index(0.99)].max()
    low = max(0.0, 0.85 * quantiles[:, QUANTILE_LEVELS.index(0.01)].min())
    low = 0.0 if low < 0.3 * high else low
    if high <= low:
        high = low + 1.0
    columns = len(blocks) if len(blocks) <= 3 else min(6, int(np.ceil(np.sqrt(1.5 * len(blocks)))))
    rows = -(-len(blocks) // columns)
    width, height = max(7.0, 2.6 * columns + 1.2), max(3.8, 2.1 * rows + 1.1)
    # Margins in inches instead of a constrained layout, which takes longer than the drawing of so many panels.
    x0, y0, x1, y1 = 0.85 / width, 0.6 / height, 1 - 1.3 / width, 1 - 0.75 / height
    figure = _figure(width, height, layout=None)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(x0, y0, x1, y1, wspace=0.08, hspace=0.22)
    names = short_names(blocks, width=26)
    grid = np.linspace(low, high, 97)
    images = {block: _density(records[records["block"] == block], grid) for block in blocks}
    # One colour scale as well; the densest of all cells is often a single early record.
    top = max(1e-6, float(np.quantile(np.concatenate([image[1].ravel() for image in images.values()]), 0.999)))
    for panel, block in zip(panels.ravel(), blocks, strict=False):
        edges, shares, steps, middle, inner = images[block]
        mesh = panel.pcolormesh(edges, grid, shares, cmap="cividis", norm=PowerNorm(0.5, 0, top), rasterized=True)
        line = {"color": "white", "lw": 1.3, "solid_capstyle": "butt"}
        if len(steps) == 1:
            steps, middle, inner = edges, np.repeat(middle, 2), np.repeat(inner, 2, axis=1)
        panel.plot(steps, middle, label="median", **line)
        for quantile, label in zip(inner, ("1% and 99% of neurons", None), strict=True):
            panel.plot(steps, quantile, **{**line, "lw": 1.0, "ls": ":"}, label=label)
        panel.set_title(names[block], fontsize=9)
        panel.set_ylim(low, high)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(4 if columns <= 3 else 3, integer=True))
    for panel in panels.ravel()[len(blocks) :]:
        panel.set_visible(False)
        panels[-2, panel.get_subplotspec().colspan.start].tick_params(labelbottom=True)
    figure.suptitle("Magnitudes of feed-forward neurons during training, by block", fontsize=12, y=1 - 0.12 / height)
    figure.supxlabel("optimizer steps", fontsize=10, x=(x0 + x1) / 2, y=0.1 / height)
    figure.supylabel("magnitude  ‖w_in‖ · ‖w_out‖", fontsize=10, x=0.1 / width)
    beside = figure.add_axes((x1 + 0.15 / width, y0, 0.14 / width, y1 - y0))
    bar = figure.colorbar(mesh, cax=beside, extend="max")
    bar.set_label(f"share of the block's neurons\nper {grid[1] - grid[0]:.2g} of magnitude", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    legend = panels[0, 0].legend(loc="upper left", fontsize=7, framealpha=0.75, facecolor="#00224e")
    for text in legend.get_texts():
        text.set_color("white")
    return figure


def recycle_counts_figure(history: RecyclingHistory) -> Figure | None:
    """How many neurons were recycled how often, over all blocks and by block; None without any phase."""
    counts = history.counts
    if not len(history.events) or not counts:
        return None
    groups = group_times(np.concatenate(list(counts.values())), most=16)
    labels = [group.label for group in groups]
    table = np.array([[group.count(block) for group in groups] for block in counts.values()])
    total = table.sum(axis=0)
    figure = _figure(max(7.0, 0.62 * len(groups) + 3.4), 3.4 + max(1.2, 0.27 * len(counts)) + 0.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, max(1.0, 0.27 * len(counts))])
    places = np.arange(len(groups))
    above.bar(places, total, color=BLUE, width=0.8)
    above.tick_params(labelbottom=True)
    share = 100 * total / total.sum()
    for place, number, percent in zip(places, total, share, strict=True):
        text = f"{number:,}\n{_percent(percent)}" if number else "0"
        above.annotate(text, (place, number), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    if total.max() > 20 * max(1, total[total > 0].min()):
        above.set_yscale("symlog", linthresh=1)
        above.set_ylim(0, 6 * total.max())
        above.set_ylabel("neurons (log scale)")
    else:
        above.set_ylim(0, 1.22 * total.max())
        above.set_ylabel("neurons")
    phases = history.stats["phases"]
    above.set_title(f"How often neurons were recycled, in {phases} selection phase{'s' * (phases != 1)}")
    below.set_facecolor("#f2f2f2")
    below.pcolormesh(
        np.arange(len(groups) + 1) - 0.5,
        np.arange(len(counts) + 1) - 0.5,
        np.ma.masked_equal(table, 0),
        cmap="cividis",
        norm=LogNorm(0.8, max(2, table.max())),
    )
    for (row, column), number in np.ndenumerate(table):
        light = number > np.sqrt(max(2, table.max()))
        below.text(
            column,
            row,
            f"{number:,}" if number else "·",
            ha="center",
            va="center",
            fontsize=7.5,
            color="black" if light or not number else "white",
        )
    below.set_xticks(places, labels)
    below.set_yticks(np.arange(len(counts)), list(short_names(list(counts)).values()), fontsize=8)
    below.set_ylim(len(counts) - 0.5, -0.5)  # the first block on top
    below.tick_params(length=0)
    below.set_xlabel("times recycled")
    below.set_title("The same by block: number of neurons", fontsize=10)
    for side in ("top", "right"):
        above.spines[side].set_visible(False)
    return figure


def ages_figure(history: RecyclingHistory) -> Figure | None:
    """How long ago neurons were last recycled; None where none was."""
    if not history.ages:
        return None
    ages = np.concatenate(list(history.ages.values()))
    recycled = ages[ages >= 0]
    if not len(recycled):
        return None
    figure, axes = _one_panel(8, 4)
    numbers, edges = np.histogram(recycled, np.linspace(0, max(1, int(recycled.max())), 31))
    axes.bar(edges[:-1], numbers, np.diff(edges), align="edge", color=BLUE)
    if numbers.max() > 20 * numbers[numbers > 0].min():
        axes.set_yscale("symlog", linthresh=1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="optimizer steps since the neuron was last recycled", ylabel="neurons")
    if axes.get_yscale() != "linear":
        axes.set_ylabel("neurons (log scale)")
    never = len(ages) - len(recycled)
    axes.set_title(
        f"Ages of recycled neurons at step {history.stats['step']:,}\n"
        f"{len(recycled):,} of {len(ages):,}; the other {never:,} were never recycled",
        fontsize=11,
    )
    return figure


def _percent(percent: float) -> str:
    return f"{percent:.1f}%" if percent >= 0.1 else "<0.1%"


def _density(records: pd.DataFrame, grid: np.ndarray) -> tuple[np.ndarray, ...]:
    """A block's histograms over training on one grid of magnitudes.

    Returns:
        Edges of the columns in steps (n + 1,), share of neurons per cell (bins, n), steps (n,), medians (n,),
        1% and 99% quantiles (2, n).
    """
    records = records.drop_duplicates("step", keep="last").sort_values("step")
    steps = records["step"].to_numpy(dtype=float)
    shares = np.stack(
        [
            _rebin(np.array(counts, float), np.array(edges), grid) / max(1, sum(counts))
            for counts, edges in zip(records["histogram"], records["edges"], strict=True)
        ],
        axis=1,
    )
    quantiles = np.array(records["quantiles"].to_list())
    inner = quantiles[:, [QUANTILE_LEVELS.index(0.01), QUANTILE_LEVELS.index(0.99)]].T
    return _column_edges(steps), shares, steps, quantiles[:, QUANTILE_LEVELS.index(0.5)], inner


def _rebin(counts: np.ndarray, edges: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Spread a histogram's counts evenly inside its bins and count them again between the lines of `grid`."""
    below = np.concatenate([[0.0], np.cumsum(counts)])
    return np.diff(np.interp(grid, edges, below))


def _column_edges(steps: np.ndarray) -> np.ndarray:
    """Edges around each step, halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    axes = figure.subplots()
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure
