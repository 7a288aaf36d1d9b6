"""Loss against the share of neurons pruned at once, by criterion: one panel for each model."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from hf_recycle.plots.style import add_legend, line_style, percent, rows_of_panels
from hf_recycle.plots.svg import hover

Curves = tuple[Sequence[float], Mapping[str, Sequence[float]]]
"""Shares pruned, and for each criterion the loss at each of them."""


def prune_curves_figure(models: Mapping[str, Curves | Sequence[Curves]], title: str, ylabel: str) -> Figure:
    """The curves of models, by the models' names; several curves of one model are its seeds."""
    figure, panels = rows_of_panels(list(models), title, "neurons of each layer pruned", ylabel)
    for panel, curves in zip(panels, models.values(), strict=True):
        seeds: Sequence[Curves] = [curves] if isinstance(curves, tuple) else curves
        for number, criterion in enumerate(seeds[0][1], start=1):
            for seed, (shares, losses) in enumerate(seeds):
                style = line_style(number, marker=True) | {"linewidth": 1.4 if len(seeds) == 1 else 0.9}
                (line,) = panel.plot(shares, losses[criterion], label=None if seed else criterion, **style)
                pairs = zip(shares, losses[criterion], strict=True)
                hover(line, [f"{criterion}, {percent(share)} pruned: {loss:.4f}" for share, loss in pairs])
        panel.xaxis.set_major_formatter(percent)
    add_legend(figure, panels[0], title="pruned first")
    return figure
