"""The figures of a study. To add a kind, write a function here and decorate it; see CONTRIBUTING."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_recycle.plots.counts import count_bars
from hf_recycle.plots.losses import LOSS_AXIS
from hf_recycle.plots.magnitudes import MAGNITUDE, magnitudes_figure, shares_between
from hf_recycle.plots.pruning import prune_curves_figure
from hf_recycle.plots.style import (
    BLUE,
    GREY,
    LABEL,
    VERMILION,
    add_legend,
    clip,
    dress,
    line_style,
    new_figure,
    one_panel,
    percent,
    rows_of_panels,
    set_title,
)
from hf_recycle.plots.svg import hover
from hf_recycle.studies.inference import paired_difference
from hf_recycle.studies.measures import pairs_of, task_ends
from hf_recycle.studies.plan import FigurePlan
from hf_recycle.studies.results import RunResult, StudyResults
from hf_recycle.utils.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

_BINS = 40
_SEED = {"linewidth": 0.6, "alpha": 0.45}  # the line of one seed, beside the thicker one of their mean

FIGURES: Registry[Callable[[StudyResults, FigurePlan], Figure | None]] = Registry("kind of figure")
"""Drawings by kind: a figure, or None where no arm has what it needs."""


@FIGURES.register
def losses(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """evaluation loss over steps, and its difference from the baseline's: mean over seeds, with a thin line for each"""
    base = results.study.baseline
    arms = [arm for arm in _present(results, plan) if _curves(results.of(arm))]
    if not arms:
        return None
    compared = [arm for arm in arms if base is not None and arm != base and results.paired(arm, base)]
    figure = new_figure(6.4 if compared else 3.8)
    set_title(figure, plan.title)
    panels = figure.subplots(2 if compared else 1, 1, sharex=True, squeeze=False)[:, 0]
    dress(panels[0], ylabel=LOSS_AXIS)
    styles = _styles(results, plan)
    for arm in arms:
        _lines(panels[0], arm, _curves(results.of(arm)), styles[arm])
    _cut_off_the_start(panels[0])
    if base is not None and compared:
        dress(panels[1], ylabel=f"loss minus that of {clip(base, 1.2)} (nats)")
        panels[1].axhline(0, color=GREY, lw=0.8)
        for arm in compared:
            pairs = [_curves(pair) for pair in results.paired(arm, base)]
            apart = [{step: pair[0][step] - pair[1][step] for step in pair[0]} for pair in pairs if pair]
            _lines(panels[1], arm, apart, styles[arm])
    panels[-1].set_xlabel("optimizer steps", fontsize=LABEL)
    add_legend(figure, panels[0])
    return figure


def _curves(runs: Sequence[RunResult]) -> list[dict[int, float]]:
    """The evaluation losses of runs at the steps that all of them have; empty if there are none."""
    curves = [dict(run.evaluations) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [{step: curve[step] for step in steps} for curve in curves] if steps else []


def _lines(panel: Axes, arm: str, curves: Sequence[Mapping[int, float]], style: Mapping[str, Any]) -> None:
    if not curves:
        return
    steps = list(curves[0])
    values = np.array([list(curve.values()) for curve in curves])
    (line,) = panel.plot(steps, values.mean(0), label=arm, marker=".", markersize=3, **style)
    seen = [(step, value) for step, value in zip(steps, values.mean(0), strict=True) if np.isfinite(value)]
    hover(line, [f"{arm}, step {step:,}: {value:.4f}" for step, value in seen])
    if len(curves) > 1:
        panel.plot(steps, values.T, **{**style, **_SEED})


def _cut_off_the_start(panel: Axes) -> None:
    """Leaves out the fall of the first steps, which would flatten what tells the arms apart."""
    # A run that diverged has no losses to show.
    drawn = [np.asarray(line.get_ydata()) for line in panel.lines]
    lines = [finite for line in drawn if len(finite := line[np.isfinite(line)])]
    if lines:
        low, high = min(line.min() for line in lines), max(line[len(line) // 4] for line in lines)
        margin = 0.05 * (high - low + 1e-3)
        panel.set_ylim(low - margin, high + margin)


@FIGURES.register
def differences(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """difference of the study's measure from the baseline: each seed, and the 95% interval of the mean"""
    base = results.study.baseline
    arms = [arm for arm in _present(results, plan) if arm != base and results.paired(arm, base)] if base else []
    if base is None or not arms:
        return None
    name = f"loss minus that of {clip(base, 2.5)} (nats)"
    figure, panel = one_panel(1.5 + 0.25 * len(arms), plan.title, name, "")
    panel.axvline(0, color=GREY, lw=1)
    for row, arm in enumerate(arms):
        pairs = pairs_of(results, arm, base)
        values, seeds = [one - two for one, two in pairs], [run.seed for run, _ in results.paired(arm, base)]
        found = paired_difference(*zip(*pairs, strict=True))
        (dots,) = panel.plot(values, [row] * len(values), "o", color=BLUE, mfc="white", ms=4, label="one seed")
        hover(dots, [f"seed {seed}: {value:+.4f}" for seed, value in zip(seeds, values, strict=True)])
        if found.low is not None and found.high is not None:
            panel.plot([found.low, found.high], [row, row], "-", color=VERMILION, lw=1.8, label="95% interval")
        panel.plot([found.mean], [row], "|", color=VERMILION, ms=12, mew=2, label="mean")
        if row == 0:
            add_legend(figure, panel)
    panel.set_yticks(range(len(arms)), [clip(arm, 1.8) for arm in arms])
    panel.set_ylim(len(arms) - 0.5, -0.5)
    return figure


@FIGURES.register
def tasks(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """of tasks in a row, the training loss at the end of each: median over seeds, with a thin line for each seed"""
    runs = {arm: results.of(arm) for arm in _present(results, plan)}
    ends = {
        arm: [task_ends(run) for run in found] for arm, found in runs.items() if found[0].settings.get("facts_tasks")
    }
    if not ends:
        return None
    figure, panel = one_panel(4.2, plan.title, "task", "training loss at its end (nats)")
    styles = _styles(results, plan)
    for arm, curves in ends.items():
        numbers, values = range(1, len(curves[0]) + 1), np.array(curves)
        (line,) = panel.plot(numbers, np.median(values, 0), label=arm, **styles[arm])
        hover(line, [f"{arm}, task {task}: {value:.4f}" for task, value in enumerate(np.median(values, 0), start=1)])
        panel.plot(numbers, values.T, **{**styles[arm], **_SEED})
    add_legend(figure, panel)
    return figure


@FIGURES.register
def recycle_counts(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """how many neurons were recycled how often, by arm: mean over seeds, with a dot for each"""
    counts = {}
    for arm in _present(results, plan):
        histories = [run.history for run in results.of(arm)]
        found = [np.concatenate(list(h.counts.values())) for h in histories if h is not None and len(h.events)]
        if found:
            counts[arm] = found
    if not counts:
        return None
    figure, panels = rows_of_panels(list(counts), plan.title, "times recycled", "neurons", columns=2)
    for panel, found in zip(panels, counts.values(), strict=True):
        count_bars(panel, found, most=8)
    panels[0].set_ylim(0, max(panel.get_ylim()[1] for panel in panels))
    return figure


@FIGURES.register
def magnitudes(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """magnitude histograms over training, by layer (the first arm and seed that recorded them)"""
    for run in _first_runs(results, plan):
        history = run.history
        title = f"{plan.title} ({run.arm}, seed {run.seed})"
        if history is not None and (figure := magnitudes_figure(history, title)) is not None:
            return figure
    return None


@FIGURES.register
def final_magnitudes(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """magnitude histograms at the end of training, arms side by side, all layers together: a line for each seed"""
    figure, panel = one_panel(3.8, plan.title, MAGNITUDE, "density of neurons")
    for arm, style in _styles(results, plan).items():
        drawn = 0
        for run in results.of(arm):
            records = None if run.history is None else run.history.magnitudes
            if records is None or not len(records):
                continue
            last = records[(records["step"] == records["step"].max()) & (records["histogram"].map(len) > 0)]
            if len(last):
                panel.plot(*_density(last), label=None if drawn else arm, **{**style, "linewidth": 1.0})
                drawn += 1
    if not panel.lines:
        return None
    add_legend(figure, panel)
    return figure


@FIGURES.register
def prune_curves(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """loss of final models against the share of neurons pruned at once, by criterion: a line for each seed"""
    # Late: this brings models and the Trainer, which reading a study can do without.
    from hf_recycle.studies.one_shot import one_shot_curves

    models = {}
    for arm in _present(results, plan):
        runs = [one_shot_curves(run) for run in results.of(arm) if run.history is not None]
        if runs:
            models[arm] = [(curves.shares, curves.losses) for curves in runs]
    return prune_curves_figure(models, plan.title, LOSS_AXIS) if models else None


@FIGURES.register
def dead(results: StudyResults, plan: FigurePlan) -> Figure | None:
    """share of the neurons of final models that never fire on the validation data: every seed"""
    # Late: this brings models and the Trainer, which reading a study can do without.
    from hf_recycle.studies.one_shot import dead_share

    runs = {arm: [run for run in results.of(arm) if run.history is not None] for arm in _present(results, plan)}
    shares = {arm: [dead_share(run) for run in found] for arm, found in runs.items() if found}
    if not shares:
        return None
    figure, panel = one_panel(1.5 + 0.25 * len(shares), plan.title, "neurons that never fire", "")
    for row, (arm, values) in enumerate(shares.items()):
        (dots,) = panel.plot(values, [row] * len(values), "o", color=BLUE, mfc="white", ms=4)
        hover(dots, [f"{arm}: {percent(value)}" for value in values])
    panel.xaxis.set_major_formatter(percent)
    panel.set_yticks(range(len(shares)), [clip(arm, 1.8) for arm in shares])
    panel.set_ylim(len(shares) - 0.5, -0.5)
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
    figure, panel = one_panel(3.6, plan.title, "feed-forward neurons per layer", "evaluation loss (nats)")
    (dots,) = panel.plot(*zip(*points, strict=True), "o", color=BLUE, mfc="white", ms=4.5, label="one seed")
    hover(dots, [f"{width:,} neurons: {loss:.4f}" for width, loss in points])
    sizes = sorted({width for width, _ in points})
    means = [np.mean([loss for width, loss in points if width == size]) for size in sizes]
    panel.plot(sizes, means, "-", color=VERMILION, lw=1.4, label="mean")
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    add_legend(figure, panel)
    return figure


def _density(records: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The histograms of several blocks as one: middles of bins, and the density of neurons there, of integral 1; both
    `(_BINS,)`."""
    edges = np.array(records["edges"].to_list())
    grid = np.linspace(edges.min(), edges.max(), _BINS + 1)
    return (grid[:-1] + grid[1:]) / 2, shares_between(grid, records) / np.diff(grid)


def _present(results: StudyResults, plan: FigurePlan) -> list[str]:
    return [arm for arm in plan.arms if results.has(arm)]


def _first_runs(results: StudyResults, plan: FigurePlan) -> list[RunResult]:
    return [results.of(arm)[0] for arm in _present(results, plan)]


def _styles(results: StudyResults, plan: FigurePlan) -> dict[str, dict[str, Any]]:
    """How the line of each arm is drawn: the baseline is black and solid in every figure."""
    present = _present(results, plan)
    others = [arm for arm in present if arm != results.study.baseline]
    return {arm: line_style(others.index(arm) + 1 if arm in others else 0) for arm in present}
