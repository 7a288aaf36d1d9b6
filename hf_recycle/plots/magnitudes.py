"""Magnitudes of neurons over training."""

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from hf_recycle.plots.style import LABEL, SCALE, SMALL, WIDTH, block_panels, percent
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import QUANTILE_LEVELS

MAGNITUDE = "magnitude  ‖w_in‖ · ‖w_out‖"


def magnitudes_figure(history: RecyclingHistory, title: str | None = None) -> Figure | None:
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
    title = title or "Magnitudes of feed-forward neurons during training, by block"
    figure, panels, inside = block_panels(blocks, title, "optimizer steps", MAGNITUDE, right=0.95, bottom=0.2)
    grid = np.linspace(low, high, 97)
    images = {block: _over_training(records[records["block"] == block], grid) for block in blocks}
    # One colour scale as well; the densest of all cells is often a single early record.
    top = max(1e-6, float(np.quantile(np.concatenate([image[1].ravel() for image in images.values()]), 0.999)))
    mesh = None
    for panel, block in zip(panels, blocks, strict=True):
        edges, shares, steps, middle, inner = images[block]
        panel.grid(visible=False)
        mesh = panel.pcolormesh(edges, grid, shares, cmap=SCALE, norm=PowerNorm(0.5, 0, top), rasterized=True)
        if len(steps) == 1:
            steps, middle, inner = edges, np.repeat(middle, 2), np.repeat(inner, 2, axis=1)
        panel.plot(steps, middle, color="white", lw=1.3, solid_capstyle="butt", label="median")
        for quantile, label in zip(inner, ("1% and 99% of the neurons", None), strict=True):
            panel.plot(steps, quantile, color="white", lw=1.0, ls=":", label=label)
        panel.set_ylim(low, high)
    x0, y0, x1, y1 = inside
    bar = figure.colorbar(mesh, cax=figure.add_axes((x1 + 0.12 / WIDTH, y0, 0.12 / WIDTH, y1 - y0)), extend="max")
    bar.set_label(f"share of the neurons\nper {grid[1] - grid[0]:.2g} of magnitude", fontsize=LABEL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.set_major_formatter(percent)
    options = {"loc": "lower center", "ncols": 2, "fontsize": SMALL, "facecolor": "#00224e", "labelcolor": "white"}
    figure.legend(*panels[0].get_legend_handles_labels(), bbox_to_anchor=((x0 + x1) / 2, 0.0), **options)
    return figure


def _over_training(records: pd.DataFrame, grid: np.ndarray) -> tuple[np.ndarray, ...]:
    """A block's histograms over training on one grid of magnitudes.

    Returns:
        Edges of the columns in steps (n + 1,), share of neurons per cell (bins, n), steps (n,), medians (n,),
        1% and 99% quantiles (2, n).
    """
    records = records.drop_duplicates("step", keep="last").sort_values("step")
    steps = records["step"].to_numpy(dtype=float)
    shares = np.stack([shares_between(grid, records.iloc[[row]]) for row in range(len(records))], axis=1)
    quantiles = np.array(records["quantiles"].to_list())
    inner = quantiles[:, [QUANTILE_LEVELS.index(0.01), QUANTILE_LEVELS.index(0.99)]].T
    return _column_edges(steps), shares, steps, quantiles[:, QUANTILE_LEVELS.index(0.5)], inner


def shares_between(grid: np.ndarray, records: pd.DataFrame) -> np.ndarray:
    """Share of all neurons of some records between the lines of `grid` (n + 1,): (n,). Inside a bin of a record's own
    histogram, neurons are taken to be spread evenly."""
    below = np.zeros(len(grid))
    for counts, edges in zip(records["histogram"], records["edges"], strict=True):
        below += np.interp(grid, np.array(edges), np.concatenate([[0.0], np.cumsum(np.array(counts, float))]))
    return np.diff(below) / max(1, sum(sum(counts) for counts in records["histogram"]))


def _column_edges(steps: np.ndarray) -> np.ndarray:
    """Edges around each step, halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
