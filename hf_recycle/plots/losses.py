"""The losses of a run."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_recycle.plots.style import BLUE, GREEN, GREY, VERMILION, add_legend, one_panel
from hf_recycle.plots.svg import hover
from hf_recycle.records.history import RecyclingHistory

LOSS_AXIS = "loss (nats per predicted token)"
_MOST_MARKS = 100


def loss_figure(history: RecyclingHistory, unigram_entropy: float | None = None) -> Figure | None:
    """Training and evaluation loss over steps, with the selection phases marked; None without losses.

    Args:
        unigram_entropy: entropy of the corpus's unigrams in nats, drawn as a line beside the losses.
    """
    logs = history.logs
    curves: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        (name, logs.loc[np.isfinite(logs[column]), ["step", column]].to_numpy(), style)
        for column, name, style in (
            ("loss", "training", {"color": BLUE, "lw": 1.1}),
            ("eval_loss", "evaluation", {"color": VERMILION, "lw": 1.6, "ls": "--", "marker": "o", "ms": 3.5}),
        )
        if column in logs
    ]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    figure, axes = one_panel(3.6, "Loss during training", "optimizer steps", LOSS_AXIS)
    for name, points, style in curves:
        if len(points) == 1:
            style = {**style, "marker": "o"}  # one point makes no line
        (line,) = axes.plot(points[:, 0], points[:, 1], label=name, **style)
        if "marker" in style:
            hover(line, [f"{name} loss at step {int(step):,}: {loss:.4f}" for step, loss in points])
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=GREY, ls=":", lw=1.4, label="unigram entropy of the corpus")
    phases = np.unique(history.events["step"].to_numpy())
    if 0 < len(phases) <= _MOST_MARKS:
        # Short marks on the axis: lines through the whole panel would hide the curves.
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(phases, np.zeros(len(phases)), "|", color=GREEN, ms=8, mew=1.4, label="selection phase", **place)
    add_legend(figure, axes)
    return figure
