import pytest
from tiny_runs import arguments, tokenizer, train

__all__ = ["arguments", "tokenizer", "train"]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Cards without figures: drawing them would take most of the time of these runs, and has tests of its own."""
    monkeypatch.setattr("hf_recycle.report.figures.figure_images", lambda *_, **__: {})
