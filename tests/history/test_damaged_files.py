"""Damaged files of a checkpoint: nothing invalid is ever accepted, whatever happened to the bytes."""

import os
import pickle

import pytest
import torch
from checkpoint_files import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.simulated_runs import write_run

from hf_recycle.records import files
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.files import RecyclingFileError

SHARED = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_or_a_folder_in_its_place(tmp_path, name):
    with pytest.raises(RecyclingFileError, match=f"{name}: the file is missing; "):
        READERS[name](tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(RecyclingFileError, match="not a regular file"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_its_place_is_not_run(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for content in (pickle.dumps(Bomb()), b"", b"\0" * 100, b"PAR1" * 4, b'{"__metadata__": {}}'):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecyclingFileError, match=name):
            READERS[name](tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", READERS)
@SHARED
@given(data=st.data())
def test_any_truncation_is_found(tmp_path, name, data):
    path = tmp_path / name
    if not (tmp_path / "whole").exists():
        write_run(tmp_path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = (tmp_path / "whole").read_bytes()
    # JSON may lose the line break at its end and still be whole.
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])
    with pytest.raises(RecyclingFileError, match=name):
        READERS[name](tmp_path)


@pytest.mark.parametrize("name", [files.STATE_FILE, files.HISTORY_FILE])
@settings(SHARED, max_examples=250)
@given(data=st.data())
def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path, name, data):
    path = tmp_path / name
    if not (tmp_path / "whole").exists():
        write_run(tmp_path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = bytearray((tmp_path / "whole").read_bytes())
    path.write_bytes(whole)
    before = READERS[name](tmp_path)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    try:
        after = READERS[name](tmp_path)
    except RecyclingFileError:
        return
    # Some bits carry nothing: statistics, the name of the writer, the version of the package.
    if name == files.HISTORY_FILE:
        assert after.equals(before)
    else:
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", [files.CONFIG_FILE, files.STATS_FILE])
@settings(SHARED, max_examples=150)
@given(data=st.data())
def test_json_with_any_byte_changed_is_refused_or_valid(tmp_path, name, data):
    path = tmp_path / name
    if not (tmp_path / "whole").exists():
        write_run(tmp_path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = bytearray((tmp_path / "whole").read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        content = READERS[name](tmp_path)
    except RecyclingFileError:
        return
    assert content["format_version"] == FORMAT_VERSION
    if name == files.STATS_FILE:
        assert sum(content["times_recycled"].values()) == content["neurons"]["total"]
