"""Figures are drawn, hold something, and are left out where there is nothing to draw."""

import subprocess
import sys
import warnings

import matplotlib.image
import numpy as np
import pytest
import torch
from support.simulated_runs import write_run

from hf_recycle.plots.run import (
    _rebin,
    draw_figures,
    loss_figure,
    magnitudes_figure,
    recycle_counts_figure,
)
from hf_recycle.records import files
from hf_recycle.records.history import HistoryRecorder, RecyclingHistory

ALL = ["loss.png", "magnitudes.png", "recycle_counts.png", "ages.png"]
MANY = tuple(f"bert.encoder.layer.{i}" for i in range(13))


@pytest.mark.parametrize(
    ("blocks", "phases", "favourites"),
    [
        (("encoder.layer.0", "encoder.layer.1"), 3, True),
        (("only",), 1, True),
        (MANY, 25, False),
    ],
)
def test_figures_are_pictures_of_something(tmp_path, blocks, phases, favourites):
    history = write_run(tmp_path, blocks, phases=phases, favourites=favourites)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout does not fit
        paths = draw_figures(history, tmp_path / "new" / "figures", unigram_entropy=6.5)
    assert [path.name for path in paths] == ALL
    for path in paths:
        picture = matplotlib.image.imread(path)
        height, width = picture.shape[:2]
        assert 300 < height < 3000
        assert 600 < width < 3000
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
        ({"phases": 0, "magnitudes": False}, ["loss.png"]),
        ({"phases": 0, "losses": False}, ["magnitudes.png"]),
        ({"magnitudes": False, "losses": False}, ["recycle_counts.png", "ages.png"]),
    ],
)
def test_a_figure_without_data_is_left_out(tmp_path, have, names):
    history = write_run(tmp_path, **have)
    assert [path.name for path in draw_figures(history, tmp_path / "figures")] == names
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(names)


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
    assert [path.name for path in draw_figures(history, tmp_path / "figures")] == ["magnitudes.png"]


def test_panels_are_in_the_models_order(tmp_path):
    history = write_run(tmp_path, MANY)
    panels = [axes.get_title() for axes in magnitudes_figure(history).axes if axes.get_title()]
    assert panels == [f"layer.{i}" for i in range(13)]


def test_the_bars_count_all_neurons(tmp_path):
    history = write_run(tmp_path, phases=4)
    bars = [patch.get_height() for patch in recycle_counts_figure(history).axes[0].patches]
    counts = np.concatenate(list(history.counts.values()))
    assert bars == np.bincount(counts).tolist()


def test_rebinning_keeps_the_neurons_and_their_place():
    edges = np.linspace(0, 4, 5)
    grid = np.linspace(-1, 5, 7)
    np.testing.assert_allclose(_rebin(np.array([4.0, 0, 2, 6]), edges, grid), [0, 4, 0, 2, 6, 0])
    np.testing.assert_allclose(_rebin(np.array([4.0]), np.array([0.0, 1.0]), np.linspace(0, 1, 5)), [1, 1, 1, 1])


def test_nothing_global_is_touched(tmp_path):
    code = (
        "import sys, matplotlib\n"
        "settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from hf_recycle.records.history import RecyclingHistory\n"
        "from hf_recycle.plots.run import draw_figures\n"
        f"assert len(draw_figures(RecyclingHistory.from_pretrained({str(tmp_path)!r}), {str(tmp_path)!r})) == 4\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    write_run(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True)
