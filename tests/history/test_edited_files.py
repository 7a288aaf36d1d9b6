"""Configs, statistics and states that were edited or forged: each is refused with what is wrong."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from checkpoint_files import BLOCKS, READERS, neurons

from hf_recycle.records import files
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.files import RecyclingFileError


def edited(run, name, edit):
    content = json.loads((run / name).read_text())
    edit(content)
    (run / name).write_text(json.dumps(content))


BAD_CONFIGS = {
    "format_version is '2'": lambda c: c.update(format_version="2"),
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


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
@pytest.mark.parametrize("name", READERS)
def test_another_format_says_what_reads_it(run, name, version):
    if name.endswith(".json"):
        edited(run, name, lambda content: content.update(format_version=version, package_version="7.1.0"))
    elif name == files.STATE_FILE:
        safetensors.torch.save_file({}, run / name, {"format_version": str(version), "package_version": "7.1.0"})
    else:
        texts = {"format_version": str(version), "package_version": "7.1.0"}
        table = pa.table({"new": [1]}).replace_schema_metadata(texts)
        pq.write_table(table, run / name)
    with pytest.raises(RecyclingFileError, match=rf"format {version} .*read it with hf_recycle 7\.1\.0"):
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
    "last_phase and last_step of block a contra": neurons(last_phase=(1, 3)),
    "last_phase and last_step of block a contradict": neurons(last_step=(5, 30)),
    "unknown tensor 'a/colour'": neurons() | {"a/colour": torch.zeros(2)},
    "block b is in the state but not the config": neurons() | neurons(block="b"),
    "block a is in the config but not the state": {},
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_a_forged_state(tmp_path, message):
    tensors = BAD_STATES[message]
    metadata = {"format_version": str(FORMAT_VERSION), "sha256": files._checksum(tensors)}
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
