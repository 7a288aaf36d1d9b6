"""How every figure looks: one palette, fonts for print, lines that differ without colour; PNG and SVG from one call.

Figures are matplotlib's `Figure` objects, without pyplot and rcParams: nothing global changes, no window opens, and any
thread may draw. A figure is as wide as the text of a printed page, so its fonts have the sizes given here.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.plots.svg import tidy_svg
from hf_recycle.records.naming import short_names
from hf_recycle.utils.whole_files import write_bytes

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that white paper swallows.
BLACK, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
)
GREY = "#666666"
_COLOURS = (BLACK, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
# As many dashes and markers as have no factor in common with the colours: neighbours differ in all three.
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
SCALE = "cividis"  # of densities: its lightness rises with the value, so that it prints in black and white

WIDTH = 7.0  # inches
TITLE, LABEL, SMALL = 10.0, 9.0, 7.5  # points
_DPI = 150


def line_style(number: int, *, marker: bool = False) -> dict[str, Any]:
    """How the `number`-th line is drawn: black and solid is the first, the baseline's. Told apart by dashes (5) as by
    colours (7), so 35 lines differ.

    Args:
        marker: with a marker at each point, for lines of few points.
    """
    style: dict[str, Any] = {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.4,
    }
    return style | {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 3.5} if marker else style


def new_figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def one_panel(height: float, title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of one panel, with the names of its axes."""
    figure = new_figure(height)
    set_title(figure, title)
    return figure, dress(figure.subplots(), xlabel=xlabel, ylabel=ylabel)


def rows_of_panels(
    titles: Sequence[str], title: str, xlabel: str, ylabel: str, *, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, so many in a row, on one vertical axis."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = new_figure(0.6 + (2.4 if columns > 1 else 3.2) * rows)
    set_title(figure, title)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = list(grid.ravel())
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for number, (panel, name) in enumerate(zip(panels, titles, strict=False)):
        dress(panel, clip(name, 0.85 * WIDTH / columns), xlabel, "" if number % columns else ylabel)
    return figure, panels[: len(titles)]


def block_panels(blocks: Sequence[str], title: str, xlabel: str, ylabel: str, **room: float):
    """A figure with a small panel for each block, on common axes, with margins in inches: a constrained layout would
    take longer than the drawing of so many panels.

    Args:
        room: more inches at the `right` or at the `bottom`, for a scale or a legend.

    Returns:
        The figure, its panels, and the rectangle that they fill as left, bottom, right, top in shares of the figure.
    """
    count = len(blocks)
    columns = count if count <= 3 else 3 if count <= 9 else 4 if count <= 24 else 6
    rows = -(-count // columns)
    height = 0.95 + room.get("bottom", 0.0) + rows * (2.6 if columns < 3 else 1.7 if columns == 3 else 1.35)
    figure = new_figure(height, layout=None)
    left, right, below, above = 0.7, 0.15 + room.get("right", 0.0), 0.5 + room.get("bottom", 0.0), 0.6
    inside = (left / WIDTH, below / height, 1 - right / WIDTH, 1 - above / height)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    gap, panel = 0.12, (WIDTH - left - right) / columns
    figure.subplots_adjust(*inside, wspace=gap, hspace=0.26)
    figure.suptitle(title, fontsize=TITLE, y=1 - 0.1 / height, va="top")
    figure.supxlabel(xlabel, fontsize=LABEL, x=(inside[0] + inside[2]) / 2, y=(0.08 + room.get("bottom", 0.0)) / height)
    figure.supylabel(ylabel, fontsize=LABEL, x=0.08 / WIDTH, y=(inside[1] + inside[3]) / 2)
    names = short_names(blocks, width=int(panel / (1 + gap) * 72 / (0.62 * SMALL)))
    panels = list(grid.ravel())
    for place, axes in enumerate(panels):
        if place < count:
            dress(axes, names[blocks[place]])
            axes.title.set_fontsize(SMALL)
            axes.xaxis.set_major_locator(MaxNLocator(4 if columns < 4 else 3, integer=True))
        else:
            axes.set_visible(False)
            panels[place - columns].tick_params(labelbottom=True)
    return figure, panels[:count], inside


def dress(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> Axes:
    """Gives axes their names, a faint grid below the data, and a frame on two sides."""
    axes.set_title(title, fontsize=LABEL)
    axes.set_xlabel(xlabel, fontsize=LABEL)
    axes.set_ylabel(ylabel, fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def set_title(figure: Figure, title: str) -> None:
    """The title of a figure, in as many lines as it takes."""
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 72 / (0.55 * TITLE))), fontsize=TITLE)


def add_legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """A legend below the panels of a figure with a constrained layout, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        widest = max(map(len, labels)) * 0.55 * SMALL / 72 + 0.55  # inches
        columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
        options = {"frameon": False, "fontsize": SMALL, "title": title, "title_fontsize": SMALL, "handlelength": 2.8}
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)


def clip(text: str, inches: float, size: float = LABEL) -> str:
    """A text that is no wider than so many inches; what does not fit is cut out of its middle."""
    return short_names([text], width=max(8, int(inches * 72 / (0.6 * size))))[text]


def percent(share: float, _: object = None) -> str:
    """A share in percent, as text; also for the ticks of an axis."""
    return f"{100 * share:.3g}%"


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> bytes:
    """The figure as an SVG, with what `hover` has noted. `name` begins its ids: several can stand in one page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=_DPI)
    return tidy_svg(buffer.getvalue(), name)


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` with the suffixes `.png` and `.svg`; its folder is made if missing. Returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {path.with_suffix(".png"): png(figure), path.with_suffix(".svg"): svg(figure, path.stem)}
    for file, content in files.items():
        write_bytes(file, content)
    return list(files)
