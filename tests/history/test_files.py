"""The files of a checkpoint: what is written is read back, and nothing invalid is ever accepted."""

import json
import math
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_runs import write_run

from hf_recycle import files
from hf_recycle.files import RecyclingFileError
from hf_recycle.history import HistoryRecorder, RecyclingHistory
from hf_recycle.recorder import HISTORY_SCHEMA

READERS = {
    files.CONFIG_FILE: files.read_config,
    files.STATE_FILE: files.read_state,
    files.HISTORY_FILE: files.read_history,
    files.STATS_FILE: files.read_stats,
}
SHARED = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCKS = [{"name": "a", "num_neurons": 2, "gated": False}]


@pytest.fixture
def run(tmp_path):
    """The folder of a small run that is valid."""
    write_run(tmp_path)
    return tmp_path


def neurons(counts=(0, 2), last_phase=(0, 3), last_step=(0, 30), block="a"):
    return {
        f"{block}/counts": torch.tensor(counts, dtype=torch.int32),
        f"{block}/last_phase": torch.tensor(last_phase, dtype=torch.int32),
        f"{block}/last_step": torch.tensor(last_step, dtype=torch.int64),
    }


# ---- Round trips ----


def test_config_round_trip(tmp_path):
    arguments = {"recycle_steps": 10, "recycle_layers": [0, 2], "recycle_reinit": "initial", "x": None, "y": 0.1}
    path = files.write_config(tmp_path, {"arguments": arguments, "blocks": BLOCKS, "ancestry": ["a"]})
    assert path == tmp_path / "recycling_config.json"
    assert files.read_config(tmp_path) == {
        "format_version": 1,
        "package_version": files.package_version(),
        "arguments": arguments,
        "blocks": BLOCKS,
        "ancestry": ["a"],
    }


@settings(SHARED, max_examples=30)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6), st.dictionaries(st.text(), st.text(), max_size=2))
def test_state_round_trip(tmp_path, counts, metadata):
    metadata = {k: v for k, v in metadata.items() if k not in ("format_version", "package_version", "sha256")}
    if any("\ud800" <= character <= "\udfff" for text in [*metadata, *metadata.values()] for character in text):
        return
    tensors = (
        neurons(counts, counts, counts)
        | {
            "a/transition/new": torch.randn(2, 3).T,  # not contiguous
            "trainer/flag": torch.tensor(True),
            "trainer/half": torch.ones(2, dtype=torch.bfloat16)[1:],  # a view
        }
    )
    files.write_state(tmp_path, tensors, metadata)
    back, texts = files.read_state(tmp_path, [{"name": "a", "num_neurons": len(counts)}])
    assert texts == metadata | {"format_version": "1", "package_version": files.package_version()}
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
    assert files.read_state(tmp_path)[0] == {}


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


# ---- Damage ----


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
        assert after[0].keys() == before[0].keys()
        assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])


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
    assert content["format_version"] == 1
    if name == files.STATS_FILE:
        assert sum(content["times_recycled"].values()) == content["neurons"]["total"]


# ---- Hand edits ----


def edited(run, name, edit):
    content = json.loads((run / name).read_text())
    edit(content)
    (run / name).write_text(json.dumps(content))


BAD_CONFIGS = {
    "format_version is '1'": lambda c: c.update(format_version="1"),
    "format_version is True": lambda c: c.update(format_version=True),
    "format_version is None": lambda c: c.pop("format_version"),
    "package_version is 3": lambda c: c.update(package_version=3),
    "arguments is \\[\\]": lambda c: c.update(arguments=[]),
    "argument x is": lambda c: c["arguments"].update(x={"nested": 1}),
    "blocks is None": lambda c: c.update(blocks=None),
    "blocks is \\[1\\]": lambda c: c.update(blocks=[1]),
    "two blocks": lambda c: c["blocks"].append(c["blocks"][0]),
    "num_neurons of block encoder.layer.0 is -1": lambda c: c["blocks"][0].update(num_neurons=-1),
    "num_neurons of block encoder.layer.0 is 40.0": lambda c: c["blocks"][0].update(num_neurons=40.0),
    "num_neurons of block encoder.layer.0 is 1000": lambda c: c["blocks"][0].update(num_neurons=10**30),
    "gated of block encoder.layer.0 is 0": lambda c: c["blocks"][0].update(gated=0),
    "is no name": lambda c: c["blocks"][0].update(name="../../etc"),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_an_edited_config(run, message):
    edited(run, files.CONFIG_FILE, BAD_CONFIGS[message])
    with pytest.raises(RecyclingFileError, match=message):
        files.read_config(run)


BAD_STATS = {
    "step is -1": lambda s: s.update(step=-1),
    "phases is 1.5": lambda s: s.update(phases=1.5),
    "total is 'many'": lambda s: s["neurons"].update(total="many"),
    "neurons and losses": lambda s: s.update(losses=None),
    "blocks is 7": lambda s: s.update(blocks=7),
    "times_recycled of all blocks does not add up": lambda s: s["times_recycled"].update({"9": 1}),
    "times_recycled of all blocks is": lambda s: s["times_recycled"].update({"-1": 1}),
    "times_recycled of block encoder.layer.1 is": lambda s: s["blocks"][1].update(times_recycled={"0": -40}),
    "does not add up": lambda s: s["blocks"][0].update(recycling_events=0),
    "is not the sum": lambda s: s["blocks"].pop(),
    "magnitude_quantiles of block": lambda s: s["blocks"][0].update(magnitude_quantiles={"0": "big"}),
}


@pytest.mark.parametrize("message", BAD_STATS)
def test_edited_stats(run, message):
    edited(run, files.STATS_FILE, BAD_STATS[message])
    with pytest.raises(RecyclingFileError, match=message):
        files.read_stats(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds a list"),
        ('{"a": NaN}', "can't be read as JSON"),
        ('{"a": 1e999}', "not a finite number"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"a": "\\ud800"}', "can't be read as JSON"),
        ("[" * 200_000, "can't be read as JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "can't be read as JSON"),
        ("\ufeff{}", "can't be read as JSON"),
    ],
)
def test_json_that_is_not_ours(tmp_path, text, message):
    for name in (files.CONFIG_FILE, files.STATS_FILE):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(RecyclingFileError, match=message):
            READERS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [(files.CONFIG_FILE, 2**25), (files.STATS_FILE, 2**25), (files.STATE_FILE, 2**37), (files.HISTORY_FILE, 2**32)],
)
def test_a_file_that_is_too_large_is_not_opened(tmp_path, name, size):
    with open(tmp_path / name, "wb") as file:
        file.truncate(size)  # sparse: takes no room
    with pytest.raises(RecyclingFileError, match=f"{size:,} bytes and at most"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_newer_format_says_what_is_needed(run, name):
    if name.endswith(".json"):
        edited(run, name, lambda content: content.update(format_version=2, package_version="7.1.0"))
    elif name == files.STATE_FILE:
        safetensors.torch.save_file({}, run / name, {"format_version": "2", "package_version": "7.1.0"})
    else:
        table = pa.table({"new": [1]}).replace_schema_metadata({"format_version": "2", "package_version": "7.1.0"})
        pq.write_table(table, run / name)
    with pytest.raises(RecyclingFileError, match=r"format 2 .*hf_recycle 7\.1\.0 or newer is needed"):
        READERS[name](run)


# Written by `save_file` with the right checksum: what someone makes who knows the format.
BAD_STATES = {
    "negative": neurons(counts=(0, -2)),
    "counts of block a is torch.int64": neurons() | {"a/counts": torch.tensor([0, 2])},
    "counts of block a is torch.float32": neurons() | {"a/counts": torch.tensor([0.0, math.nan])},
    "last_step of block a has shape \\(3,\\) where \\(2,\\)": neurons(last_step=(0, 30, 30)),
    "counts of block a has shape \\(1, 2\\)": neurons() | {"a/counts": torch.zeros(1, 2, dtype=torch.int32)},
    "last_phase of block a is missing": {k: v for k, v in neurons().items() if "phase" not in k},
    "counts and last_phase of block a contradict": neurons(counts=(0, 4)),
    "counts and last_phase of block a contra": neurons(last_phase=(1, 3)),
    "last_phase and last_step of block a contradict": neurons(last_step=(5, 30)),
    "unknown tensor 'a/colour'": neurons() | {"a/colour": torch.zeros(2)},
    "block b is in the state but not the config": neurons() | neurons(block="b"),
    "block a is in the config but not the state": {},
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_a_forged_state(tmp_path, message):
    tensors = BAD_STATES[message]
    metadata = {"format_version": "1", "sha256": files._checksum(tensors)}
    safetensors.torch.save_file(tensors, tmp_path / files.STATE_FILE, metadata)
    with pytest.raises(RecyclingFileError, match=message):
        files.read_state(tmp_path, BLOCKS)


@pytest.mark.parametrize("version", [None, "", "one", "-1", "0", "1.0", "9" * 5000])
def test_a_state_without_a_good_version(tmp_path, version):
    metadata = None if version is None else {"format_version": version}
    safetensors.torch.save_file(neurons(), tmp_path / files.STATE_FILE, metadata)
    with pytest.raises(RecyclingFileError, match="format"):
        files.read_state(tmp_path)


def test_a_state_edited_with_its_checksum_left(run):
    tensors = safetensors.torch.load_file(run / files.STATE_FILE)
    with safetensors.safe_open(run / files.STATE_FILE, "pt") as file:
        metadata = file.metadata()
    tensors["encoder.layer.0/last_step"][:] += tensors["encoder.layer.0/counts"]
    safetensors.torch.save_file(tensors, run / files.STATE_FILE, metadata)
    with pytest.raises(RecyclingFileError, match="changed or damaged after it was written"):
        files.read_state(run)


def rows(**changes):
    phase = {
        "kind": "phase",
        "step": 10,
        "block": "a",
        "phase": 1,
        "requested": 2,
        "eligible": 2,
        "recycled": [0],
        "note": "",
    }
    return [phase | changes]


def histogram(**changes):
    magnitude = {
        "kind": "magnitude",
        "step": 10,
        "block": "a",
        "note": "",
        "quantiles": [0.5] * 11,
        "histogram": [2] + [0] * 63,
        "edges": [float(i) for i in range(65)],
    }
    return [magnitude | changes]


BAD_HISTORIES = {
    "kind holds": rows(kind="other"),
    "kind holds .*None": rows(kind=None),
    "step is missing": rows(step=None),
    "step holds -1": rows(step=-1),
    "phase holds 0": rows(phase=0),
    "phase is missing": rows(phase=None),
    "block is missing": rows(block=None),
    "note is missing": rows(note=None),
    "requested holds -2": rows(requested=-2),
    "recycled more neurons than": rows(recycled=[0, 1], eligible=1),
    "recycled is missing": rows(recycled=None),
    "recycled has lists with missing": rows(recycled=[None]),
    "negative index": rows(recycled=[-1]),
    "more neurons than its block": rows(recycled=[2]),
    "names more neurons than its": rows(eligible=3),
    "one neuron twice": rows(recycled=[1, 1]),
    "two rows for one phase": rows() + rows(),
    "not in the order": rows() + rows(phase=2, step=5),
    "not in the order of their": rows() + rows(block="b", step=11),
    "block 'b' that the config": rows(block="b"),
    "right number of quantiles": histogram(quantiles=[0.5] * 10),
    "right number of quantiles, bins": histogram(edges=[]),
    "negative counts or numbers that are not finite": histogram(histogram=[3, -1] + [0] * 62),
    "negative counts or numbers": histogram(quantiles=[math.nan] * 11),
    "quantiles of a row are not ascending": histogram(quantiles=[1.0, 0.5] + [2.0] * 9),
    "edges of a magnitude histogram are not": histogram(edges=[0.0] * 65),
    "does not add up to the number": histogram(histogram=[1] * 64),
    "does not add up": histogram(histogram=[1] + [0] * 63),
    "no name or no value": [{"kind": "log", "step": 1, "metrics": [{"name": None, "value": 1.0}]}],
    "no name or no": [{"kind": "log", "step": 1, "metrics": None}],
    "name of more than": [{"kind": "log", "step": 1, "metrics": [{"name": "x" * 1001, "value": 1.0}]}],
    "texts of up to 100,000 bytes": rows(note="x" * 100_000),
}


@pytest.mark.parametrize("message", BAD_HISTORIES)
def test_a_forged_history(tmp_path, message):
    blocks = BLOCKS + ([{"name": "b", "num_neurons": 2}] if "their" in message else [])
    schema = HISTORY_SCHEMA.with_metadata({"format_version": "1"})
    pq.write_table(pa.Table.from_pylist(BAD_HISTORIES[message], schema), tmp_path / files.HISTORY_FILE)
    with pytest.raises(RecyclingFileError, match=message):
        files.read_history(tmp_path, blocks)


def test_the_rows_that_are_forged_above_are_valid_before(tmp_path):
    schema = HISTORY_SCHEMA.with_metadata({"format_version": "1"})
    good = rows() + rows(phase=2, step=20) + histogram() + histogram(quantiles=[], histogram=[], edges=[], note="2")
    pq.write_table(pa.Table.from_pylist(good, schema), tmp_path / files.HISTORY_FILE)
    assert len(files.read_history(tmp_path, BLOCKS)) == 4


def test_a_history_of_too_many_rows_is_not_read(tmp_path):
    path = tmp_path / files.HISTORY_FILE
    # A column of one repeated value: 60 million rows in a few kilobytes.
    schema = pa.schema([("kind", pa.string())], metadata={"format_version": "1"})
    batch = pa.table({"kind": pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), ["log"])})
    with pq.ParquetWriter(path, schema.set(0, batch.schema.field(0)), compression="zstd") as writer:
        for _ in range(60):
            writer.write_table(batch.replace_schema_metadata({"format_version": "1"}))
    assert path.stat().st_size < 200_000
    with pytest.raises(RecyclingFileError, match="claims 60,000,000 rows and a history has at most"):
        files.read_history(tmp_path)


@pytest.mark.parametrize("column", ["note", "metrics"])
def test_a_text_that_many_rows_share_is_not_expanded(tmp_path, column):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 300_000, pa.int32()), ["x" * 4000])
    number = len(texts)
    columns = {name: pa.nulls(number, HISTORY_SCHEMA.field(name).type) for name in HISTORY_SCHEMA.names}
    columns["kind"] = pa.array(["log"] * number)
    columns["step"] = pa.array(range(number), pa.int64())
    if column == "note":
        columns["note"] = texts
    else:
        items = pa.StructArray.from_arrays([texts, pa.array([0.0] * number)], ["name", "value"])
        columns["metrics"] = pa.ListArray.from_arrays(pa.array(range(number + 1), pa.int32()), items)
    path = tmp_path / files.HISTORY_FILE
    pq.write_table(pa.table(columns).replace_schema_metadata({"format_version": "1"}), path, compression="zstd")
    assert path.stat().st_size < 10_000_000  # for 1.2 GB of text
    with pytest.raises(RecyclingFileError, match="texts of up to 4,000 bytes in 300,000 rows"):
        files.read_history(tmp_path)


def test_other_columns_are_refused(tmp_path):
    for table in (
        pa.table({"step": [1]}),
        HISTORY_SCHEMA.empty_table().append_column("extra", pa.array([], pa.int32())),
        HISTORY_SCHEMA.empty_table().set_column(1, "step", pa.array([], pa.list_(pa.int64()))),
    ):
        pq.write_table(table.replace_schema_metadata({"format_version": "1"}), tmp_path / files.HISTORY_FILE)
        with pytest.raises(RecyclingFileError, match=r"columns|can't be read"):
            files.read_history(tmp_path)


def test_an_error_survives_being_sent_to_another_process(tmp_path):
    with pytest.raises(RecyclingFileError) as info:
        files.read_config(tmp_path)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


def test_reading_leaves_a_whole_run_alone(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    RecyclingHistory.from_pretrained(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
