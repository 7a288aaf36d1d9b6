"""What the figures of analyses share. Colours are the Okabe-Ito palette, which colour-blind readers can tell apart."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Without pyplot: nothing global changes, no window opens."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def line_style(number: int) -> dict[str, Any]:
    """How the line of the `number`-th model is drawn, a different one for each of 28."""
    return {"color": PALETTE[number % len(PALETTE)], "ls": _STYLES[number // len(PALETTE) % len(_STYLES)]}


def open_axes(axes: Axes) -> None:
    """Takes away the frame's upper and right side."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
