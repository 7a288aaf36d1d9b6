"""One-shot pruning curves as a table and a figure."""

from collections.abc import Sequence
from pathlib import Path

from hf_recycle.analysis.labels import short_labels
from hf_recycle.analysis.pruning import PruneCurves
from hf_recycle.analysis.tables import table
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.plots.pruning import prune_curves_figure
from hf_recycle.plots.style import save


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
    """Draws `prune_curves` into `folder`: one panel for each model. Returns the paths."""
    labels = short_labels([model.label for model in curves])
    models = {label: (model.shares, model.losses) for label, model in zip(labels, curves, strict=True)}
    what = " or ".join(sorted({TASKS[model.task].predicted for model in curves}))
    title = "One-shot pruning of feed-forward neurons, by criterion"
    return save(prune_curves_figure(models, title, f"loss (nats per {what})"), folder / "prune_curves")
