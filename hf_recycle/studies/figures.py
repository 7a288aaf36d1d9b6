"""The figures of a study. To add a kind, write a function here and decorate it; see CONTRIBUTING."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_recycle.plots.run import magnitudes_figure
from hf_recycle.studies.inference import paired_difference
from hf_recycle.studies.plan import FigurePlan
from hf_recycle.studies.results import RunResult, StudyResults
from hf_recycle.utils.registry import Registry

# Okabe-Ito, without its yellow: lines of it can't be seen on white.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("-", "--", ":")
_BINS = 40

FIGURES: Registry[Callable[[StudyResults, FigurePlan], Figure | None]] = Registry("kind of figure")
"""Drawings by kind: a figure, or None where no arm has what it needs."""


@FIGURES.register
def losses(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """evaluation loss over steps: mean over seeds, with the range"""
    figure, panel = _panel(8, 4.5)
    for arm, style in _styles(results, plan).items():
        curves = [dict(run.evaluations) for run in results.of(arm)]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not steps:
            continue
        values = np.array([[curve[step] for step in steps] for curve in curves])
        panel.plot(steps, values.mean(0), label=arm, lw=1.6, **style)
        if len(curves) > 1:
            panel.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.12, lw=0)
    if not panel.lines:
        return None
    panel.set(xlabel="optimizer steps", ylabel="evaluation loss (nats per predicted token)")
    # The fall of the first steps would flatten what tells the arms apart. A run that diverged has no losses to show.
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in panel.lines]
    lines = [finite for line in drawn if len(finite := line[np.isfinite(line)])]
    if lines:
        low, high = min(line.min() for line in lines), max(line[len(line) // 4] for line in lines)
        panel.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
    return _titled(figure, panel, plan)


@FIGURES.register
def differences(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """difference of the final evaluation loss from the baseline: each seed, and the 95% interval of the mean"""
    base = results.study.baseline
    if base is None:
        return None
    arms = [arm for arm in _present(results, plan) if arm != base and results.paired(arm, base)]
    if not arms:
        return None
    figure, panel = _panel(8, 1.4 + 0.36 * len(arms))
    for row, arm in enumerate(arms):
        pairs = results.paired(arm, base)
        values = [one.eval_loss - two.eval_loss for one, two in pairs]
        found = paired_difference([one.eval_loss for one, _ in pairs], [two.eval_loss for _, two in pairs])
        panel.plot(values, [row] * len(values), "o", color="#0072B2", ms=4, alpha=0.6)
        if found.low is not None and found.high is not None:
            panel.plot([found.low, found.high], [row, row], "-", color="#D55E00", lw=1.6)
        panel.plot([found.mean], [row], "|", color="#D55E00", ms=14, mew=2)
    panel.axvline(0, color="#666666", lw=1)
    panel.set_yticks(range(len(arms)), arms)
    panel.invert_yaxis()
    panel.set_xlabel(f"evaluation loss minus that of {base} (nats)")
    panel.set_title(plan.title)
    return figure


@FIGURES.register
def recycle_counts(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """how many neurons were recycled how often, by arm (the first seed)"""
    histories = [(run.arm, run.history) for run in _first_runs(results, plan) if run.history is not None]
    recycled = [(arm, history) for arm, history in histories if len(history.events)]
    if not recycled:
        return None
    figure = _figure(3.2 * len(recycled) + 0.6, 3.6)
    panels = figure.subplots(1, len(recycled), sharey=True, squeeze=False)[0]
    for panel, (arm, history) in zip(panels, recycled, strict=True):
        counts = np.concatenate(list(history.counts.values()))
        times, neurons = np.unique(counts, return_counts=True)
        panel.bar(times, 100 * neurons / len(counts), color="#0072B2", width=0.8)
        for time, number in zip(times, neurons, strict=True):
            if len(times) <= 10:
                panel.annotate(f"{number:,}", (time, 100 * number / len(counts)), ha="center", va="bottom", fontsize=7)
        panel.set_title(arm, fontsize=10)
        panel.set_xlabel("times recycled")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("neurons (%)")
    figure.suptitle(plan.title, fontsize=12)
    return figure


@FIGURES.register
def magnitudes(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """magnitude histograms over training, by layer (the first arm and seed that recorded them)"""
    for run in _first_runs(results, plan):
        figure = None if run.history is None else magnitudes_figure(run.history)
        if figure is not None:
            figure.suptitle(f"{plan.title} ({run.arm}, seed {run.seed})", fontsize=12)
            return figure
    return None


@FIGURES.register
def final_magnitudes(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """magnitude histograms at the end of training, arms side by side, all layers together (the first seed)"""
    figure, panel = _panel(8, 4.2)
    styles = _styles(results, plan)
    for run in _first_runs(results, plan):
        records = None if run.history is None else run.history.magnitudes
        if records is None or not len(records):
            continue
        last = records[(records["step"] == records["step"].max()) & (records["histogram"].map(len) > 0)]
        if not len(last):
            continue
        panel.plot(*_density(last), label=run.arm, lw=1.6, **styles[run.arm])
    if not panel.lines:
        return None
    panel.set(xlabel="magnitude  ‖w_in‖ · ‖w_out‖", ylabel="density of neurons")
    return _titled(figure, panel, plan)


@FIGURES.register
def prune_curves(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """loss of final models against the share of neurons pruned at once, by criterion (the first seed of each arm)"""
    # Late: this brings models and the Trainer, which reading a study can do without.
    from hf_recycle.studies.one_shot import one_shot_curves

    runs = [run for run in _first_runs(results, plan) if run.history is not None]
    if not runs:
        return None
    figure = _figure(4.6 * len(runs) + 1.4, 4)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for panel, run in zip(panels, runs, strict=True):
        curves = one_shot_curves(run)
        shares = [100 * share for share in curves.shares]
        for number, (criterion, losses) in enumerate(curves.losses.items(), start=1):
            panel.plot(shares, losses, marker="o", ms=4, lw=1.6, label=criterion, **_style(number))
        panel.set_title(f"{run.arm}, seed {run.seed}", fontsize=10)
        panel.set_xlabel("neurons of each layer pruned (%)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss (nats per predicted token)")
    panels[0].legend(frameon=False, fontsize=8, title="pruned first")
    figure.suptitle(plan.title, fontsize=12)
    return figure


@FIGURES.register
def widths(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """final evaluation loss against the width of the feed-forward layer"""
    points = []
    for arm in _present(results, plan):
        runs = results.of(arm)
        neurons = 0 if runs[0].history is None else runs[0].history.config["blocks"][0]["num_neurons"]
        points += [(neurons, run.eval_loss) for run in runs]
    if len({width for width, _ in points}) < 2:
        return None
    figure, panel = _panel(6.5, 4)
    panel.plot(*zip(*points, strict=True), "o", color="#0072B2", ms=5, alpha=0.7, label="one seed")
    sizes = sorted({width for width, _ in points})
    means = [np.mean([loss for width, loss in points if width == size]) for size in sizes]
    panel.plot(sizes, means, "-", color="#D55E00", lw=1.4, label="mean")
    panel.set_xscale("symlog", base=2, linthresh=max(1, min(size for size in sizes if size) / 2))
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()
    panel.set(xlabel="feed-forward neurons per layer", ylabel="evaluation loss (nats)")
    return _titled(figure, panel, plan)


def _density(records: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The histograms of several blocks as one: middles of bins, and the density of neurons there, of integral 1; both
    `(_BINS,)`."""
    edges = np.array(records["edges"].to_list())
    grid = np.linspace(edges.min(), edges.max(), _BINS + 1)
    # Neurons spread evenly over their bin.
    below = sum(
        np.interp(grid, own, np.concatenate([[0], np.cumsum(counts)]))
        for counts, own in zip(records["histogram"], edges, strict=True)
    )
    return (grid[:-1] + grid[1:]) / 2, np.diff(below) / (below[-1] * np.diff(grid))


def _present(results: StudyResults, plan: FigurePlan) -> list[str]:
    return [arm for arm in plan.arms if results.has(arm)]


def _first_runs(results: StudyResults, plan: FigurePlan) -> list[RunResult]:
    return [results.of(arm)[0] for arm in _present(results, plan)]


def _styles(results: StudyResults, plan: FigurePlan) -> dict[str, dict[str, Any]]:
    """How the line of each arm is drawn: the baseline is black in every figure."""
    others = [arm for arm in _present(results, plan) if arm != results.study.baseline]
    return {arm: _style(others.index(arm) + 1 if arm in others else 0) for arm in _present(results, plan)}


def _style(number: int) -> dict[str, str]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "ls": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _titled(figure: Figure, panel: Axes, plan: FigurePlan) -> Figure:
    panel.set_title(plan.title)
    panel.legend(frameon=False, fontsize=8, ncols=2 if len(panel.lines) > 6 else 1)
    return figure
