"""Figures are drawn, hold something, and are left out where there is nothing to draw."""

import subprocess
import sys
import warnings
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from support.simulated_runs import write_run

from hf_recycle.plots.counts import ages_figure, count_bars, recycle_counts_figure
from hf_recycle.plots.losses import loss_figure
from hf_recycle.plots.magnitudes import magnitudes_figure, shares_between
from hf_recycle.plots.run import draw_figures
from hf_recycle.plots.style import SMALL, WIDTH, line_style, rows_of_panels, svg
from hf_recycle.records import files
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import HistoryRecorder

ALL = ["loss", "magnitudes", "recycle_counts", "ages"]


def with_suffixes(names):
    return [f"{name}{suffix}" for name in names for suffix in (".png", ".svg")]


MANY = tuple(f"bert.encoder.layer.{i}" for i in range(13))


@pytest.mark.parametrize(
    ("blocks", "phases", "favourites"),
    [
        (("encoder.layer.0", "encoder.layer.1"), 3, True),
        (("only",), 1, True),
        pytest.param(MANY, 25, False, marks=pytest.mark.slow),
    ],
)
def test_figures_are_pictures_of_something(tmp_path, blocks, phases, favourites):
    history = write_run(tmp_path, blocks, phases=phases, favourites=favourites)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout does not fit
        paths = draw_figures(history, tmp_path / "new" / "figures", unigram_entropy=6.5)
    assert [path.name for path in paths] == with_suffixes(ALL)
    for path in paths[::2]:
        picture = matplotlib.image.imread(path)
        height, width = picture.shape[:2]
        assert 300 < height < 3000
        assert width == 150 * WIDTH  # fonts have the size they were given, in print
        assert path.stat().st_size < 1_000_000
        # Axes and grid are grey: colour is data.
        assert (np.ptp(picture[..., :3], axis=2) > 0.2).sum() > 300
        # Nothing is cut off: the border of the page is white.
        border = [picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]]
        assert all((strip[..., :3] == 1).all() for strip in border)


@pytest.mark.parametrize(
    ("have", "names"),
    [
        ({"phases": 0, "magnitudes": False, "losses": False}, []),
        ({"phases": 0, "magnitudes": False}, ["loss"]),
        ({"phases": 0, "losses": False}, ["magnitudes"]),
        ({"magnitudes": False, "losses": False}, ["recycle_counts", "ages"]),
    ],
)
def test_a_figure_without_data_is_left_out(tmp_path, have, names):
    history = write_run(tmp_path, **have)
    assert [path.name for path in draw_figures(history, tmp_path / "figures")] == with_suffixes(names)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(with_suffixes(names))


def with_records(folder, record):
    """A run's history with other magnitudes and losses."""
    write_run(folder, phases=0, magnitudes=False, losses=False)
    recorder = HistoryRecorder()
    record(recorder)
    files.write_history(folder, recorder.to_table())
    return RecyclingHistory.from_pretrained(folder)


def test_losses_that_are_not_finite_make_no_figure(tmp_path):
    history = with_records(tmp_path, lambda recorder: recorder.log(1, {"loss": float("nan")}))
    assert loss_figure(history) is None


def test_the_loss_figure_shows_the_recorded_losses(tmp_path):
    history = write_run(tmp_path)
    (axes,) = loss_figure(history, 6.5).axes
    curves = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(curves["training"].get_ydata(), history.logs["loss"])
    np.testing.assert_allclose(curves["evaluation"].get_xdata(), history.logs["step"])
    assert list(curves["unigram entropy of the corpus"].get_ydata()) == [6.5, 6.5]
    assert curves["selection phase"].get_xdata().tolist() == [10, 20, 30]
    assert "nats" in axes.get_ylabel()


def test_magnitudes_that_are_not_finite_make_no_figure(tmp_path):
    nan = torch.full((40,), float("nan"))
    history = with_records(tmp_path, lambda recorder: recorder.magnitudes(1, "encoder.layer.0", nan))
    assert magnitudes_figure(history) is None


def test_magnitudes_that_are_all_zero_can_be_drawn(tmp_path):
    zero = torch.zeros(40)
    history = with_records(tmp_path, lambda recorder: recorder.magnitudes(1, "encoder.layer.0", zero))
    assert [path.name for path in draw_figures(history, tmp_path / "figures")] == with_suffixes(["magnitudes"])


def test_panels_are_in_the_models_order(tmp_path):
    history = write_run(tmp_path, MANY)
    panels = [axes.get_title() for axes in magnitudes_figure(history).axes if axes.get_title()]
    assert panels == [f"layer.{i}" for i in range(13)]


def test_the_bars_count_all_neurons_on_a_linear_axis(tmp_path):
    history = write_run(tmp_path, phases=4, d_ff=400)
    above, below = recycle_counts_figure(history).axes
    counts = np.concatenate(list(history.counts.values()))
    numbers = np.bincount(counts)
    assert [bar.get_height() for bar in above.patches] == pytest.approx(numbers / len(counts))
    assert [text.get_text().split("\n")[0] for text in above.texts] == [f"{number:,}" for number in numbers]
    by_block = [0 if text.get_text() == "·" else int(text.get_text()) for text in below.texts]
    assert np.reshape(by_block, (2, -1)).sum(0).tolist() == numbers.tolist()
    axes = [above, below, *ages_figure(history).axes]
    assert {axis.get_scale() for panel in axes for axis in (panel.xaxis, panel.yaxis)} == {"linear"}


@pytest.mark.parametrize(("panels", "most"), [(1, 12), (2, 8)])
def test_texts_of_bars_keep_apart(panels, most):
    figure, axes = rows_of_panels(["a"] * panels, "title", "times recycled", "neurons", columns=2)
    count_bars(axes[0], [np.repeat(np.arange(most - 1), 31_234)], most=most)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes[0].texts]
    assert len(boxes) == most - 1
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert all(axes[0].get_window_extent().y1 > box.y1 for box in boxes)


def test_histograms_keep_the_neurons_and_their_place_on_another_grid():
    records = pd.DataFrame({"histogram": [[4.0, 0, 2, 6]], "edges": [np.linspace(0, 4, 5)]})
    np.testing.assert_allclose(12 * shares_between(np.linspace(-1, 5, 7), records), [0, 4, 0, 2, 6, 0])
    records = pd.DataFrame({"histogram": [[4.0], [4.0]], "edges": [[0.0, 1.0], [1.0, 2.0]]})
    np.testing.assert_allclose(8 * shares_between(np.linspace(0, 2, 5), records), [2, 2, 2, 2])


def test_a_legend_covers_no_data(tmp_path):
    figure = loss_figure(write_run(tmp_path), 6.5)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 < figure.axes[0].get_window_extent().y0


@pytest.mark.slow
def test_long_names_of_blocks_fit_their_panels(tmp_path):
    blocks = tuple(f"model.{i}.a_tower_with_a_very_long_name_of_its_own.feed_forward_{i}" for i in range(24))
    figure = magnitudes_figure(write_run(tmp_path, blocks, phases=1))
    figure.draw_without_rendering()
    boxes = [panel.title.get_window_extent() for panel in figure.axes[:4]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert figure.axes[0].title.get_fontsize() == SMALL


def test_lines_differ_without_colour():
    styles = [line_style(number, marker=True) for number in range(35)]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 35
    for one, two in pairwise(styles):
        assert one["linestyle"] != two["linestyle"]
        assert one["marker"] != two["marker"]
    assert styles[0]["color"] == "#000000"
    assert styles[0]["linestyle"] == "-"


def test_an_svg_is_the_same_each_time_and_says_its_values(tmp_path):
    history = write_run(tmp_path)
    one, two = (svg(loss_figure(history), "loss") for _ in range(2))
    assert one == two
    losses = history.logs.loc[history.logs["eval_loss"].notna(), ["step", "eval_loss"]].to_numpy()
    titles = [title.text for title in ElementTree.fromstring(one).iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [f"evaluation loss at step {int(step)}: {loss:.4f}" for step, loss in losses]
    assert b"<metadata" not in one


@pytest.mark.slow  # another process imports what it needs
def test_nothing_global_is_touched(tmp_path):
    code = (
        "import sys, matplotlib\n"
        "settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from hf_recycle.records.history import RecyclingHistory\n"
        "from hf_recycle.plots.run import draw_figures\n"
        f"assert len(draw_figures(RecyclingHistory.from_pretrained({str(tmp_path)!r}), {str(tmp_path)!r})) == 8\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    write_run(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True)
