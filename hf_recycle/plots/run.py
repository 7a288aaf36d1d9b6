"""The figures of a run, drawn from its `RecyclingHistory` alone."""

from pathlib import Path

from matplotlib.figure import Figure

from hf_recycle.plots.ceiling import ceiling_figure
from hf_recycle.plots.counts import ages_figure, recycle_counts_figure
from hf_recycle.plots.losses import loss_figure
from hf_recycle.plots.magnitudes import magnitudes_figure
from hf_recycle.plots.style import png, save, svg
from hf_recycle.records.ceiling_file import read_ceiling
from hf_recycle.records.history import RecyclingHistory


def draw_figures(history: RecyclingHistory, folder: str | Path, *, unigram_entropy: float | None = None) -> list[Path]:
    """Draw the figures that `history` has data for into `folder` (made if missing), each as PNG and as SVG.

    `loss`, `magnitudes`, `recycle_counts`, `ages`, `ceiling`: a figure without data is left out.

    Args:
        history: what happened.
        unigram_entropy: entropy of the corpus's unigrams in nats, drawn as a line beside the losses.

    Returns:
        The paths of the figures drawn.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [
        path for name, figure in _figures(history, unigram_entropy).items() for path in save(figure, Path(folder, name))
    ]


def figure_images(history: RecyclingHistory, *, unigram_entropy: float | None = None) -> dict[str, bytes]:
    """The same figures for a model card: {name of the file: PNG}."""
    return {f"{name}.png": png(figure) for name, figure in _figures(history, unigram_entropy).items()}


def figure_pictures(history: RecyclingHistory, *, unigram_entropy: float | None = None) -> dict[str, bytes]:
    """The same figures for a page: {name of the card's file: SVG}."""
    return {f"{name}.png": svg(figure, name) for name, figure in _figures(history, unigram_entropy).items()}


def _figures(history: RecyclingHistory, unigram_entropy: float | None) -> dict[str, Figure]:
    figures = {
        "loss": loss_figure(history, unigram_entropy),
        "magnitudes": magnitudes_figure(history),
        "recycle_counts": recycle_counts_figure(history),
        "ages": ages_figure(history),
    }
    if (ceiling := read_ceiling(history.folder)) is not None:
        figures["ceiling"] = ceiling_figure({"": ceiling})
    return {name: figure for name, figure in figures.items() if figure is not None}
