import pytest
from tiny_runs import arguments, tokenizer, train
from transformers.utils import logging

__all__ = ["arguments", "tokenizer", "train"]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Cards without figures: drawing them would take most of the time of these runs, and has tests of its own."""
    monkeypatch.setattr("hf_recycle.plots.run.figure_images", lambda *_, **__: {})


@pytest.fixture
def said(caplog):
    """`said()`: the warnings so far."""
    logging.enable_propagation()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    logging.disable_propagation()
