"""Caches of a test's own."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def private_caches(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's caches, nor another test's."""
    root = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("HF_RECYCLE_CACHE", str(root / "hf_recycle"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
    return root
