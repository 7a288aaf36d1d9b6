"""Histories that were forged: each is refused with what is wrong."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoint_files import BLOCKS

from hf_recycle.records import files
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.files import RecyclingFileError
from hf_recycle.records.recorder import HISTORY_SCHEMA
from hf_recycle.records.untrusted.history_rows import check_rows


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


def activity(block="a", **metrics):
    named = [{"name": name, "value": float(value)} for name, value in metrics.items()]
    return [{"kind": "activity", "step": 10, "block": block, "note": "", "metrics": named}]


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
    "more neurons were recycled than": rows(recycled=[0, 1], eligible=1),
    "recycled is missing": rows(recycled=None),
    "recycled has lists with missing": rows(recycled=[None]),
    "negative index": rows(recycled=[-1]),
    "more neurons than its block": rows(recycled=[2]),
    "more neurons were eligible than the block": rows(eligible=3),
    "one neuron was recycled twice": rows(recycled=[1, 1]),
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
    "a note of 501 characters": rows(note="x" * 501),
    "an activity does not say all": activity(neurons=2, dead=1),
    "an activity counts neurons": activity(neurons=3, dead=0, dormant=0),
    "an activity counts": activity(neurons=2, dead=2, dormant=1),
    "an activity counts neurons that": activity(neurons=2, dead=0.5, dormant=1),
    "an activity counts neurons that its": activity(neurons=2, dead=float("nan"), dormant=1),
    "tells of a block 'c'": activity("c", neurons=2, dead=0, dormant=1),
}


def read(folder: Path, blocks: list[dict]) -> pa.Table:
    table = files.read_history(folder, blocks)
    check_rows(folder / files.HISTORY_FILE, table, blocks)
    return table


@pytest.mark.parametrize("message", BAD_HISTORIES)
def test_a_forged_history(tmp_path, message):
    blocks = BLOCKS + ([{"name": "b", "num_neurons": 2}] if "their" in message else [])
    schema = HISTORY_SCHEMA.with_metadata({"format_version": str(FORMAT_VERSION)})
    pq.write_table(pa.Table.from_pylist(BAD_HISTORIES[message], schema), tmp_path / files.HISTORY_FILE)
    with pytest.raises(RecyclingFileError, match=message):
        read(tmp_path, blocks)


def test_the_rows_that_are_forged_above_are_valid_before(tmp_path):
    schema = HISTORY_SCHEMA.with_metadata({"format_version": str(FORMAT_VERSION)})
    good = rows() + rows(phase=2, step=20) + histogram() + histogram(quantiles=[], histogram=[], edges=[], note="2")
    good += activity(neurons=2, dead=0, dormant=1)
    pq.write_table(pa.Table.from_pylist(good, schema), tmp_path / files.HISTORY_FILE)
    assert len(read(tmp_path, BLOCKS)) == 5


def test_other_columns_are_refused(tmp_path):
    for table in (
        pa.table({"step": [1]}),
        HISTORY_SCHEMA.empty_table().append_column("extra", pa.array([], pa.int32())),
        HISTORY_SCHEMA.empty_table().set_column(1, "step", pa.array([], pa.list_(pa.int64()))),
    ):
        pq.write_table(
            table.replace_schema_metadata({"format_version": str(FORMAT_VERSION)}), tmp_path / files.HISTORY_FILE
        )
        with pytest.raises(RecyclingFileError, match=r"columns|can't be read"):
            files.read_history(tmp_path)
