import pytest
from support.tiny_runs import arguments, tokenizer, train
from transformers.utils import logging

__all__ = ["arguments", "tokenizer", "train"]


@pytest.fixture(autouse=True)
def _no_figures(figures_not_drawn):
    """For every test here."""


@pytest.fixture
def said(caplog):
    """`said()`: the warnings so far."""
    logging.enable_propagation()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    logging.disable_propagation()
