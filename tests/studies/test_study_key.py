"""What a run's key depends on: all that its result depends on, and nothing else."""

import importlib.metadata
import os
import shutil

import pytest

from hf_recycle.studies import key
from hf_recycle.studies.key import code_version, run_key


@pytest.fixture
def data(tmp_path):
    """Settings of a run on a text of its own."""
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n")
    return {"seed": 1, "train_file": str(text)}


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"output_dir": "elsewhere", "run_name": "x", "disable_tqdm": True, "report_to": "none"},
        {"logging_steps": 7, "logging_first_step": True, "log_level": "error"},
        {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": "hf_x", "hub_tag_steps": True},
        {"preprocessing_num_workers": 8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_cannot_change_a_result_stays_out(data, elsewhere):
    assert run_key({**data, **elsewhere}) == run_key(data)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"eval_steps": 3}, {"mlm_probability": 0.3}, {"tokenizer_vocab_size": 512}]
)
def test_settings_count(data, other):
    assert run_key({**data, **other}) != run_key(data)


def test_the_content_of_a_file_counts_and_not_where_it_lies(data, tmp_path):
    before = run_key(data)
    copied = tmp_path / "folder" / "text.txt"
    copied.parent.mkdir()
    shutil.copy(data["train_file"], copied)
    assert run_key({**data, "train_file": str(copied)}) == before
    stamp = copied.stat()
    copied.write_text("one\nsix\n")
    os.utime(copied, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert run_key({**data, "train_file": str(copied)}) != before
    assert run_key({**data, "validation_file": str(copied)}) != before


@pytest.mark.parametrize("name", ["dataset_name", "model_name_or_path", "tokenizer_name"])
def test_so_does_that_of_a_folder(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "part.json").write_text("{}")
    settings = {name: str(folder), "train_file": None}
    before = run_key(settings)
    shutil.copytree(folder, tmp_path / "other")
    assert run_key({**settings, name: str(tmp_path / "other")}) == before
    (folder / "deep" / "part.json").rename(folder / "part.json")
    assert run_key(settings) != before


def test_the_revision_of_a_dataset_of_the_hub_counts(monkeypatch):
    revision = {"me/text": "abc"}
    monkeypatch.setattr(key, "_revision", lambda name, config: (revision[name], config))
    before = run_key({"dataset_name": "me/text"})
    assert run_key({"dataset_name": "me/text", "dataset_config_name": "en"}) != before
    revision["me/text"] = "abd"
    assert run_key({"dataset_name": "me/text"}) != before


def test_the_built_in_facts_are_no_dataset_of_the_hub(monkeypatch):
    monkeypatch.setattr(key, "_revision", lambda *_: pytest.fail("nobody is asked"))
    assert run_key({"dataset_name": "facts"}) != run_key({"dataset_name": "facts", "facts_keys": 8})


def test_the_built_in_corpus_counts_where_it_is_used(data, monkeypatch):
    own, corpus = run_key(data), run_key({"seed": 1})
    monkeypatch.setattr(key, "corpus_fingerprint", lambda: "that of another Python")
    assert run_key(data) == own
    assert run_key({"seed": 1}) != corpus


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_versions_count(data, monkeypatch, library):
    before = run_key(data)
    version = importlib.metadata.version
    monkeypatch.setattr(key, "version", lambda name: "99.0" if name == library else version(name))
    assert run_key(data) != before


def test_the_code_counts_as_far_as_it_trains(monkeypatch, tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "methods").mkdir()
    for path in ("__init__.py", "methods/one.py", "studies/report.py"):
        (tmp_path / path).write_text("")
    monkeypatch.setattr("hf_recycle.__file__", str(tmp_path / "__init__.py"))
    versions = []
    for path in (None, "studies/report.py", "methods/one.py"):
        if path is not None:
            (tmp_path / path).write_text("changed = True")
        versions.append(code_version.__wrapped__())
    assert versions[0] == versions[1] != versions[2]
