"""Figures of what is published are drawn by another process; a save draws nothing."""

import re
import sys

import pytest
from support.simulated_runs import write_run

from hf_recycle.card.card import card_for, write_card
from hf_recycle.plots import beside, run
from hf_recycle.plots.beside import figures_beside


@pytest.mark.slow  # the other process imports what it needs
def test_another_process_draws_the_same(tmp_path, monkeypatch):
    history = write_run(tmp_path)
    expected = run.figure_images(history, unigram_entropy=6.5)
    monkeypatch.setattr(run, "figure_images", lambda *_, **__: {})  # of this process
    assert figures_beside(tmp_path, 6.5) == expected
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert figures_beside(tmp_path, 6.5) == expected, "a push that is tried again draws once"


@pytest.mark.parametrize(
    ("code", "patience", "says"),
    [
        ("import time; time.sleep(60)", 0.3, "longer than 0 s"),
        ("raise RuntimeError('no font was found')", 60, "drawing failed: RuntimeError: no font was found"),
    ],
)
def test_a_card_is_published_though_its_figures_cannot_be_drawn(tmp_path, monkeypatch, caplog, code, patience, says):
    write_run(tmp_path)
    write_card(tmp_path, figures=False)
    monkeypatch.setattr(beside, "_CODE", code)
    monkeypatch.setattr(beside, "_PATIENCE", patience)
    with pytest.raises(RuntimeError, match=says):
        figures_beside(tmp_path)
    card, figures = card_for(tmp_path, "lab/model")
    assert figures == {}
    assert 'from_pretrained("lab/model")' in card
    assert "figures/" not in card


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="holds no recycling files"):
        figures_beside(tmp_path)


def test_figures_are_drawn_for_what_is_published_alone(tmp_path, monkeypatch):
    def drawn_here(*_, **__):
        raise AssertionError("this process draws")

    monkeypatch.setattr(run, "figure_images", drawn_here)
    monkeypatch.setattr(beside, "figures_beside", lambda *_: {"loss.png": b"drawn"})
    write_run(tmp_path)
    write_card(tmp_path, figures=False)
    assert not (tmp_path / "figures").exists()
    words = (tmp_path / "README.md").read_text()
    assert "figures/" not in words
    card, figures = card_for(tmp_path, "lab/model")
    assert figures == {"figures/loss.png": b"drawn"}
    assert re.findall(r"figures/\w+\.png", card) == ["figures/loss.png"]
    assert (tmp_path / "README.md").read_text() == words


def test_figures_that_are_there_are_published_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "figure_images", lambda *_, **__: {"loss.png": b"drawn at the end"})
    monkeypatch.setattr(beside, "figures_beside", None)
    write_run(tmp_path)
    write_card(tmp_path, repo_id="lab/model")
    assert card_for(tmp_path, "lab/model") == ((tmp_path / "README.md").read_text(), {})
    other, more = card_for(tmp_path, "lab/other")
    assert more == {}
    assert "figures/loss.png" in other
