"""How often, and how long ago, neurons were recycled. Axes of counts are linear: twice as many is twice as high."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_recycle.plots.style import BLACK, BLUE, LABEL, SMALL, WIDTH, dress, new_figure, one_panel, percent, set_title
from hf_recycle.plots.svg import hover
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.naming import short_names
from hf_recycle.records.times import group_times

_MOST_GROUPS = 12  # of "times recycled", in the width of a page
_SHADES = LinearSegmentedColormap.from_list("white to blue", ["#ffffff", BLUE])


def count_bars(axes: Axes, counts: Sequence[np.ndarray], *, most: int = _MOST_GROUPS) -> list[str]:
    """Draws what share of neurons was recycled how often, as bars with their numbers.

    Args:
        counts: times recycled, (neurons,), of each run. With several, bars show the mean and a dot shows each run.
        most: bars.

    Returns:
        The labels of the bars.
    """
    groups = group_times(np.concatenate(counts), most=most)
    table = np.array([[group.count(one) for group in groups] for one in counts])  # runs × groups
    shares = table / np.array([[len(one)] for one in counts])
    places, means = np.arange(len(groups)), shares.mean(0)
    for place, group, share, numbers in zip(places, groups, means, table.T, strict=True):
        (bar,) = axes.bar(place, share, color=BLUE, width=0.8)
        text = f"{numbers.mean():,.0f}"
        hover(bar, [f"{text} neurons ({percent(share)}) were recycled {group.label} times"])
        top = max(share, shares[:, place].max())
        axes.annotate(
            f"{text}\n{_short(share)}" if numbers.any() else "0",
            (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=SMALL,
        )  # fmt: skip
    if len(counts) > 1:
        for run in shares:
            axes.plot(places, run, "o", ms=2.5, color=BLACK, mfc="white", mew=0.8)
    axes.set_ylim(0, 1.25 * shares.max())
    axes.yaxis.set_major_formatter(percent)
    axes.set_xticks(places, [group.label for group in groups])
    axes.grid(visible=False, axis="x")
    return [group.label for group in groups]


def _short(share: float) -> str:
    """A share in at most five characters, so that the texts of neighbouring bars keep apart."""
    return "100%" if share == 1 else f"{100 * share:.1f}%" if share >= 0.001 else "<0.1%"


def recycle_counts_figure(history: RecyclingHistory) -> Figure | None:
    """How many neurons were recycled how often, over all blocks and by block; None without any phase."""
    counts = history.counts
    if not len(history.events) or not counts:
        return None
    every = np.concatenate(list(counts.values()))
    rows = 0.2 * len(counts)
    figure = new_figure(3.0 + rows + 0.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.0, max(0.5, rows)])
    phases = history.stats["phases"]
    set_title(figure, f"How often neurons were recycled, in {phases} selection phase{'s' * (phases != 1)}")
    dress(above, ylabel="neurons of all blocks")
    count_bars(above, [every])
    groups = group_times(every, most=_MOST_GROUPS)
    table = np.array([[group.count(block) for group in groups] for block in counts.values()])
    shares = table / table.sum(axis=1, keepdims=True)
    dress(below, "Number of neurons by block", xlabel="times recycled")
    below.grid(visible=False)
    below.imshow(shares, cmap=_SHADES, vmin=0, vmax=1, aspect="auto")
    for (row, column), number in np.ndenumerate(table):
        colour = "white" if shares[row, column] > 0.6 else BLACK
        text = f"{number:,}" if number else "·"
        below.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)
    names = short_names(list(counts), width=int(0.25 * WIDTH * 72 / (0.6 * SMALL)))
    below.set_yticks(np.arange(len(counts)), list(names.values()))
    below.tick_params(length=0)
    above.tick_params(labelbottom=True)
    return figure


def ages_figure(history: RecyclingHistory) -> Figure | None:
    """How long ago neurons were last recycled; None where none was."""
    if not history.ages:
        return None
    ages = np.concatenate(list(history.ages.values()))
    recycled = ages[ages >= 0]
    if not len(recycled):
        return None
    never = len(ages) - len(recycled)
    title = f"Ages of the {len(recycled):,} recycled neurons at step {history.stats['step']:,}"
    figure, axes = one_panel(3.2, title, "optimizer steps since the neuron was last recycled", "neurons")
    bins = np.linspace(0, max(1, int(recycled.max())), 31)
    numbers, _ = np.histogram(recycled, bins)
    bars = axes.bar(bins[:-1], numbers, np.diff(bins), align="edge", color=BLUE)
    for bar, number, low, high in zip(bars, numbers, bins, bins[1:], strict=False):
        hover(bar, [f"{int(number):,} neurons were last recycled {low:,.0f} to {high:,.0f} steps ago"])
    axes.set_title(f"{never:,} of {len(ages):,} neurons were never recycled", fontsize=LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure
