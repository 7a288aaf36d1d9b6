"""What neurons do on a text: idle ones by layer, and what the loss would be without some."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.plots.style import (
    BLUE,
    ORANGE,
    SKY,
    SMALL,
    clip,
    dress,
    line_style,
    new_figure,
    percent,
    set_title,
)
from hf_recycle.plots.svg import hover

_LAYERS = "block, in the model's order"
_IDLE = {"dead": BLUE, "dormant": SKY, "duplicate": ORANGE}


def ceiling_figure(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A row of panels for each model: idle neurons by layer; what it costs to take half of each layer alone away, and a
    share of every layer.

    Args:
        models: what `records.ceiling_file.read_ceiling` gives, by the models' names.
    """
    figure = new_figure(0.7 + 2.5 * len(models))
    set_title(figure, "Which feed-forward neurons are idle, and what taking some away costs (bars: 3 SD)")
    grid = figure.subplots(len(models), 3, squeeze=False)
    for panels, (name, found) in zip(grid, models.items(), strict=True):
        _idle(panels[0], found, clip(name, 2.0) if len(models) > 1 else "")
        _costs(panels[1], found["blocks"], list(range(len(found["blocks"]))), [row["name"] for row in found["blocks"]])
        dress(panels[1], "half of one layer taken away", _LAYERS, "loss added (nats)")
        shares = [row["share"] for row in found["curve"]]
        whole = {"cost": 0.0, "sd": 0.0}
        _costs(panels[2], [whole, *found["curve"]], [0.0, *shares], ["none", *map(percent, shares)], line=True)
        dress(panels[2], "of every layer taken away", "share of the neurons")
        panels[2].xaxis.set_major_formatter(percent)
        panels[1].set_xlim(-0.5, len(found["blocks"]) - 0.5)
        for panel in panels[:2]:
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _idle(panel: Axes, found: Mapping[str, Any], name: str) -> None:
    blocks = found["blocks"]
    places, width = np.arange(len(blocks)), 0.8 / len(_IDLE)
    for number, (kind, colour) in enumerate(_IDLE.items()):
        shares = [row[kind] / max(1, row["neurons"]) for row in blocks]
        bars = panel.bar(places + (number - 1) * width, shares, width, color=colour, label=kind)
        for bar, row, share in zip(bars, blocks, shares, strict=True):
            hover(bar, [f"{row['name']}: {row[kind]:,} of {row['neurons']:,} neurons {kind} ({percent(share)})"])
    dress(panel, name, _LAYERS, "share of the layer's neurons")
    panel.set_ylim(0, max(0.05, panel.get_ylim()[1]))
    panel.yaxis.set_major_formatter(percent)
    panel.legend(frameon=False, fontsize=SMALL)


def _costs(panel: Axes, rows: list, places: list, names: list, line: bool = False) -> None:
    costs, deviations = ([row[key] for row in rows] for key in ("cost", "sd"))
    style = line_style(1, marker=True) | ({} if line else {"linestyle": "none"})
    (drawn,) = panel.plot(places, costs, **style)
    hover(
        drawn,
        [f"{name}: {cost:+z.4f} nats (SD {sd:.4f})" for name, cost, sd in zip(names, costs, deviations, strict=True)],
    )
    panel.errorbar(
        places, costs, [3 * sd for sd in deviations], fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=2
    )
    panel.axhline(0.0, color="black", linewidth=0.6)
