"""Recycling files that someone else made: small ones that are large in memory, and numbers that no run can have."""

import json
import os
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from support.simulated_runs import write_run

from hf_recycle.records import files
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.files import RecyclingFileError
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import HISTORY_SCHEMA
from hf_recycle.records.untrusted.parquet_size import parquet_problem
from hf_recycle.records.untrusted.recycling_files import check_content

MIB = 2**20


@pytest.fixture(autouse=True)
def _histories_are_trusted():
    """Not here."""


def bomb(folder, items: int = 0, rows: int = 1, note: str = "") -> None:
    """A history of a few kilobytes with so many logged numbers in its first row, or so many rows."""
    columns = {field.name: pa.nulls(rows, field.type) for field in HISTORY_SCHEMA}
    columns["kind"] = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["log"])
    columns["note"] = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [note])
    columns["step"] = pa.array(np.zeros(rows, np.int64))
    if items:
        names = pa.DictionaryArray.from_arrays(np.zeros(items, np.int32), ["loss"])
        numbers = pa.StructArray.from_arrays([names, pa.array(np.zeros(items))], ["name", "value"])
        columns["metrics"] = pa.ListArray.from_arrays(pa.array([0, items], pa.int32()), numbers)
    table = pa.table(columns).replace_schema_metadata({"format_version": str(FORMAT_VERSION), "package_version": "1"})
    pq.write_table(table, folder / files.HISTORY_FILE, compression="zstd", store_schema=False, write_batch_size=2**28)


def peak_memory_of(function) -> int:
    """MiB that a process takes, or one that it starts, to run `function`."""
    child = os.fork()
    if not child:
        function()
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss // 1024


def refused(run, message) -> None:
    with pytest.raises(RecyclingFileError, match=message):
        RecyclingHistory.from_pretrained(run)


def check(run) -> None:
    """As `from_pretrained`, without a process that reads the history first."""
    history = RecyclingHistory.of_own_run(run)
    check_content(run, history.config, files.read_state(run), history.table, history.stats)


def made_elsewhere(function) -> None:
    """Runs `function` in another process: making a bomb takes as much memory as it does."""
    assert peak_memory_of(function)


def lie(path, number: int) -> None:
    """Makes the footer claim one value where there are `number`."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<I", whole[-8:-4])
    footer, claim = whole[-8 - length : -8], _varint(number)
    assert footer.count(claim) == 4  # the values of two columns, told twice
    modest = footer.replace(claim, b"\x82" + b"\x80" * (len(claim) - 2) + b"\0")  # 1, in as many bytes
    path.write_bytes(whole[: -8 - length] + modest + whole[-8:])
    group = pq.read_metadata(path).row_group(0)
    assert max(group.column(i).num_values for i in range(group.num_columns)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("content", [{"items": 30_000_000}, {"rows": 300_000, "note": "x" * 4000}])
def test_a_history_that_expands_is_refused_before_it_does(run, content):
    made_elsewhere(lambda: bomb(run, **content))
    path = run / files.HISTORY_FILE
    assert path.stat().st_size < 300_000
    if "items" in content:
        lie(path, content["items"])  # Arrow reads what is there all the same
    assert peak_memory_of(lambda: refused(run, "expands to more than 2.. MiB")) < peak_memory_of(lambda: None) + 500


def _varint(number: int) -> bytes:
    number, found = number * 2, []  # zigzag
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_what_a_history_takes(run):
    path = run / files.HISTORY_FILE
    assert parquet_problem(path, 256 * MIB) is None
    assert "expands to more than 0 MiB" in parquet_problem(path, 10_000)
    path.write_bytes(b"PAR1" * 10)
    assert parquet_problem(path, MIB) is None, "whoever reads it says what is wrong"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("recycling_config.json", 5 * MIB),
        ("recycling_stats.json", 17 * MIB),
        ("recycling_history.parquet", 1025 * MIB),
    ],
)
def test_a_large_file_is_not_opened(run, name, size):
    os.truncate(run / name, size)
    refused(run, rf"{name}: it has {size:,} bytes and such a file has at most")


# ---- Numbers ----


def state(run, **changes) -> None:
    """Changes the state, with the right checksum: `name__kind` for the tensor of a block."""
    tensors = files.read_state(run)
    for key, change in changes.items():
        key = key.replace("__", "/")
        tensors[key] = change(tensors.get(key))
    safetensors.torch.save_file(tensors, run / files.STATE_FILE, files._VERSIONS | {"sha256": files._checksum(tensors)})


def fade_in(run, index=(1,), age=(2,), **more) -> None:
    """Gives neurons of block a a fade-in, and the summary its number."""
    tensors = {"index": torch.tensor(index), "age": torch.tensor(age)}
    tensors |= {f"{side}/{role}": torch.ones(len(index), 3) for side in ("old", "new") for role in ("in", "out")}
    tensors |= more
    changes = {f"a/fade_in/{key}": value for key, value in tensors.items() if value is not None}
    state(run, **{key: lambda _, value=value: value for key, value in changes.items()})
    stats = json.loads((run / files.STATS_FILE).read_text())
    stats["neurons"]["fading_in"] = len(index)
    (run / files.STATS_FILE).write_text(json.dumps(stats))


@pytest.fixture
def run(tmp_path):
    """A run of three phases, at steps 10, 20 and 30, up to step 40."""
    write_run(tmp_path, ("a", "b"), d_ff=10)
    config = json.loads((tmp_path / files.CONFIG_FILE).read_text())
    config["arguments"]["recycle_smooth_steps"] = 20
    (tmp_path / files.CONFIG_FILE).write_text(json.dumps(config))
    return tmp_path


def recycled_at_30(run) -> int:
    tensors = files.read_state(run)
    return int((tensors["a/last_step"] == 30).nonzero()[0])


def test_what_is_changed_below_is_accepted_before(run):
    fade_in(run, index=(recycled_at_30(run),), age=(9,))
    state(run, trainer__phases=lambda _: torch.tensor([3]), trainer__skipped_steps=lambda _: torch.tensor([40]))
    RecyclingHistory.from_pretrained(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__phases": lambda _: torch.tensor([2])}, "trainer/phases is 2 and the history holds 3 phases"),
        ({"trainer__phases": lambda _: torch.tensor([2**40])}, "trainer/phases is 1099511627776"),
        ({"trainer__phases": lambda _: torch.tensor([-1])}, "trainer/phases is no whole number"),
        ({"trainer__skipped_steps": lambda _: torch.tensor([41])}, "skipped_steps is 41 after 40 steps"),
        ({"trainer__skipped_steps": lambda _: torch.zeros(2, dtype=torch.int64)}, "skipped_steps is no whole number"),
        ({"trainer__running_loss": lambda _: torch.zeros(0)}, "running_loss is no whole number"),
        (
            {"a__counts": lambda counts: counts * 4, "a__last_phase": lambda last: last * 4},
            "block a in the state contra",
        ),
    ],
)
def test_forged_counters(run, changes, message):
    state(run, **changes)
    with pytest.raises(RecyclingFileError, match=message):
        check(run)


def test_a_history_of_steps_that_are_to_come(run):
    table = files.read_history(run)
    steps = np.where(table["step"].to_numpy() == 40, 4000, table["step"].to_numpy())
    files.write_history(run, table.set_column(1, "step", pa.array(steps)))
    with pytest.raises(RecyclingFileError, match="it records step 4000 and the summary was made at step 40"):
        check(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": (11,)}, "ages that no fade-in can have"),
        ({"age": (-1,)}, "ages that no fade-in can have"),
        ({"age": (5, 5)}, "ages that no fade-in can have"),
        ({"age": (2.0,)}, "the age of the fade-ins of block a is missing or has the wrong type"),
        ({"index": (10,)}, "name neurons twice, or that it does not have"),
        ({"index": (1, 1), "age": (1, 1)}, "name neurons twice"),
        ({"old/in": torch.full((1, 3), torch.nan)}, "holds no finite weights"),
        ({"new/in": torch.ones(1, 3, dtype=torch.int64)}, "holds no finite weights"),
        ({"new/in": torch.ones(2, 3)}, "no weights on the other side"),
        ({"new/in": None}, "no weights on the other side"),
        ({"neither/in": torch.ones(1, 3)}, "no weights on the other side"),
    ],
)
def test_forged_transitions(run, changes, message):
    fade_in(run, **({"index": (recycled_at_30(run),)} | changes))
    with pytest.raises(RecyclingFileError, match=message):
        check(run)


def test_a_transition_that_is_longer_than_any(run):
    config = json.loads((run / files.CONFIG_FILE).read_text())
    config["arguments"]["recycle_smooth_steps"] = 5
    (run / files.CONFIG_FILE).write_text(json.dumps(config))
    fade_in(run, index=(recycled_at_30(run),), age=(5,))
    with pytest.raises(RecyclingFileError, match="ages that no fade-in can have"):
        check(run)


def test_neurons_in_transition_that_the_summary_does_not_know(run):
    fade_in(run, index=(recycled_at_30(run),))
    stats = json.loads((run / files.STATS_FILE).read_text())
    stats["neurons"]["fading_in"] = 0
    (run / files.STATS_FILE).write_text(json.dumps(stats))
    with pytest.raises(RecyclingFileError, match="1 neurons are fading in and the summary says otherwise"):
        check(run)
