"""The files of a checkpoint: what is written is read back."""

import math
import os
import pickle

import pyarrow as pa
import pytest
import safetensors.torch
import torch
from checkpoint_files import BLOCKS, neurons
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_recycle import __version__
from hf_recycle.records import files
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.files import RecyclingFileError
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import HistoryRecorder

SHARED = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_config_round_trip(tmp_path):
    arguments = {"recycle_steps": 10, "recycle_layers": [0, 2], "recycle_reinit": "initial", "x": None, "y": 0.1}
    path = files.write_config(tmp_path, {"arguments": arguments, "blocks": BLOCKS, "ancestry": ["a"]})
    assert path == tmp_path / "recycling_config.json"
    assert files.read_config(tmp_path) == {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "arguments": arguments,
        "blocks": BLOCKS,
        "ancestry": ["a"],
    }


@settings(SHARED, max_examples=30)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
def test_state_round_trip(tmp_path, counts):
    tensors = (
        neurons(counts, counts, counts)
        | {
            "a/fade_in/new": torch.randn(2, 3).T,  # not contiguous
            "trainer/flag": torch.tensor(True),
            "trainer/half": torch.ones(2, dtype=torch.bfloat16)[1:],  # a view
        }
    )
    files.write_state(tmp_path, tensors)
    back = files.read_state(tmp_path, [{"name": "a", "num_neurons": len(counts)}])
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)


def test_history_round_trip(run):
    table = files.read_history(run)
    assert len(table) == 2 * 3 + 2 * 5 + 8
    again = run / "again"
    again.mkdir()
    files.write_history(again, table)
    assert files.read_history(again).equals(table)


def test_an_empty_run_round_trips(tmp_path):
    files.write_history(tmp_path, HistoryRecorder().to_table())
    files.write_state(tmp_path, {})
    assert len(files.read_history(tmp_path)) == 0
    assert files.read_state(tmp_path) == {}


def test_stats_write_nan_as_null(run):
    stats = files.read_stats(run)
    stats["extra"] = {"a": [math.nan, 1.5], "b": math.inf}
    files.write_stats(run, stats)
    assert files.read_stats(run)["extra"] == {"a": [None, 1.5], "b": None}
    assert "NaN" not in (run / files.STATS_FILE).read_text()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(run, monkeypatch):
    before = (run / files.STATE_FILE).read_bytes()
    listing = sorted(os.listdir(run))

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        files.write_state(run, neurons())
    assert (run / files.STATE_FILE).read_bytes() == before
    assert sorted(os.listdir(run)) == listing


def test_writers_refuse_what_readers_would(tmp_path):
    with pytest.raises(RecyclingFileError, match="negative"):
        files.write_state(tmp_path, neurons(counts=(-1, 2)))
    with pytest.raises(RecyclingFileError, match="two blocks"):
        files.write_config(tmp_path, {"arguments": {}, "blocks": BLOCKS * 2})
    with pytest.raises(RecyclingFileError, match="not JSON"):
        files.write_config(tmp_path, {"arguments": {"x": math.nan}, "blocks": BLOCKS})
    with pytest.raises(RecyclingFileError, match="columns"):
        files.write_history(tmp_path, pa.table({"step": [1]}))
    assert os.listdir(tmp_path) == []


def test_an_error_survives_being_sent_to_another_process(tmp_path):
    with pytest.raises(RecyclingFileError) as info:
        files.read_config(tmp_path)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


def test_reading_leaves_a_whole_run_alone(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    RecyclingHistory.from_pretrained(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
