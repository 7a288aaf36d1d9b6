"""One-shot pruning curves as a table and a figure."""

from collections.abc import Sequence
from pathlib import Path

from hf_recycle.analysis.labels import short_labels
from hf_recycle.analysis.pruning import PruneCurves
from hf_recycle.analysis.tables import table
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.plots.style import PALETTE, new_figure, open_axes, save


def curves_text(curves: Sequence[PruneCurves]) -> str:
    """A table for each model: a row for each share, a column for each criterion."""
    parts = []
    for model in curves:
        rows = [("pruned", *model.losses)]
        for position, share in enumerate(model.shares):
            losses = (f"{values[position]:.4f}" for values in model.losses.values())
            rows.append((f"{100 * share:g}%", *losses))
        heading = (
            f"{model.label}: loss in nats per {TASKS[model.task].predicted} ({model.tokens:,} of them), when a share "
            "of every layer's feed-forward neurons is pruned at once"
        )
        parts.append(f"{heading}\n{table(rows)}")
    return "\n\n".join(parts)


def draw_curves(curves: Sequence[PruneCurves], folder: Path) -> list[Path]:
    """Draws `prune_curves.png` into `folder`: one panel for each model. Returns its path."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(max(7.0, 5.0 * columns), 4.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    labels = short_labels([model.label for model in curves])
    for panel, model, label in zip(panels.ravel(), curves, labels, strict=False):
        for number, (criterion, losses) in enumerate(model.losses.items()):
            shares = [100 * share for share in model.shares]
            panel.plot(shares, losses, label=criterion, marker="o", ms=4, lw=1.6, color=PALETTE[number % len(PALETTE)])
        panel.set(xlabel="share of every layer's neurons pruned (%)", title=label)
        panel.set_ylabel(f"loss (nats per {TASKS[model.task].predicted})")
        panel.tick_params(labelleft=True)
        panel.grid(alpha=0.25, lw=0.6)
        panel.legend(frameon=False)
        open_axes(panel)
    for panel in panels.ravel()[len(curves) :]:
        panel.set_visible(False)
    figure.suptitle("One-shot pruning of feed-forward neurons, by criterion")
    return [save(figure, folder / "prune_curves.png")]
