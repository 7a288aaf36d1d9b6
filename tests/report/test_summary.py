"""The summary at the end of a run: right numbers, short lines, lines that work."""

import itertools
import math
import re
import shlex
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.simulated_runs import write_run

from hf_recycle.cli.main import make_parser
from hf_recycle.records.naming import short_names
from hf_recycle.records.times import group_times
from hf_recycle.runs.summary import next_steps, summary_text
from hf_recycle.utils.command_words import our_command


def test_losses_and_neurons(tmp_path):
    history = write_run(tmp_path, phases=3)
    lines = summary_text(history, unigram_entropy=6.123456).splitlines()
    first, last = 2 + 6 * math.exp(-1 / 4), 2 + 6 * math.exp(-1)
    evaluated = 2 + 5 * math.exp(-1)
    assert lines[0] == "After 40 optimizer steps"
    assert lines[1] == f"  training loss    {first:.4f} → {last:.4f} nats"
    assert lines[2].endswith(f"→ {evaluated:.4f} nats, perplexity {math.exp(evaluated):.2f}, accuracy 40.00%")
    assert lines[3].startswith("  unigram entropy  6.1235 nats")
    counts = np.concatenate(list(history.counts.values()))
    ever = int((counts > 0).sum())
    assert lines[4].startswith(f"Neurons: 80 in 2 feed-forward blocks; {ever} recycled at least once")
    assert "24 recyclings in 3 selection phases" in lines[5]
    table = {int(m[1]): int(m[2]) for line in lines if (m := re.fullmatch(r" +(\d+) +(\d+)(?: +█+)?", line))}
    assert table == dict(enumerate(np.bincount(counts).tolist()))


def test_magnitudes_of_each_block(tmp_path):
    history = write_run(tmp_path)
    lines = summary_text(history).splitlines()
    (title,) = [i for i, line in enumerate(lines) if line.startswith("Neuron magnitudes, step 0 → 40")]
    rows = history.magnitudes[history.magnitudes["block"] == "encoder.layer.0"]["quantiles"]
    cells = re.findall(r"([0-9.]+) → ([0-9.]+)", lines[title + 1])
    assert cells == [(f"{rows.iloc[0][i]:.3g}", f"{rows.iloc[-1][i]:.3g}") for i in (1, 5, 9)]
    assert lines[title + 1].split()[0] == "layer.0"


def test_the_lines_that_load_the_model_are_python(tmp_path):
    history = write_run(tmp_path)
    text = summary_text(history, model_folder="a folder/with 'quotes'", auto_class="AutoModelForCausalLM")
    code = "\n".join(line.strip() for line in text.splitlines()[-2:])
    loaded = []
    code = code.replace("from transformers import AutoModelForCausalLM", "")
    loader = type("Loader", (), {"from_pretrained": staticmethod(loaded.append)})
    exec(code, {"AutoModelForCausalLM": loader})
    assert loaded == ["a folder/with 'quotes'"]
    assert "AutoModelForMaskedLM" in summary_text(history, model_folder="x")
    assert "from_pretrained" not in summary_text(history)


def test_what_to_type_next_are_commands_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = next_steps("runs/it's a run").splitlines()
    commands = [shlex.split(line) for line in lines[1:] if not line.startswith("  #")]
    assert len(commands) == 3
    for words in commands:
        assert make_parser().parse_args(words[1:])
        assert "runs/it's a run" in words


def test_the_command_is_named_by_its_path_unless_its_environment_is_active(tmp_path, monkeypatch):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "hf-recycle").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert our_command() == ".venv/bin/hf-recycle"
    monkeypatch.chdir(folder)
    assert our_command() == "./hf-recycle"
    monkeypatch.setenv("PATH", str(folder))
    assert our_command() == "hf-recycle"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert our_command() == "hf-recycle"


@pytest.mark.parametrize(
    ("blocks", "phases", "d_ff"),
    [
        (24, 60, 30),
        (1, 1, 40),
        (9, 0, 40),
    ],
)
def test_it_stays_short(tmp_path, blocks, phases, d_ff):
    names = tuple(f"very.long.prefix.block.{i}.{'x' * (20 + i)}.output" for i in range(blocks))
    history = write_run(tmp_path, names, d_ff=d_ff, phases=phases, favourites=phases < 30)
    lines = summary_text(history, unigram_entropy=7.0, model_folder="runs/demo").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert ("none recycled" in lines[4]) == (phases == 0)


def test_a_run_without_anything(tmp_path):
    history = write_run(tmp_path, phases=0, losses=False, magnitudes=False)
    assert summary_text(history) == ("After 10 optimizer steps\nNeurons: 80 in 2 feed-forward blocks, none recycled")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=50), st.integers(2, 20))
def test_groups_cover_every_count_once(counts, most):
    counts = np.array(counts)
    groups = group_times(counts, most)
    assert len(groups) <= most
    assert sum(group.count(counts) for group in groups) == len(counts)
    assert groups[0].low == groups[0].high == 0
    assert groups[-1].high == counts.max()
    assert all(left.high + 1 == right.low for left, right in itertools.pairwise(groups))


def test_labels_of_groups():
    assert [group.label for group in group_times(np.array([7]), 8)] == list("01234567")
    assert [group.label for group in group_times(np.array([8]), 3)] == ["0", "1–4", "5–8"]


@pytest.mark.parametrize(
    ("blocks", "short"),
    [
        (["bert.encoder.layer.0", "bert.encoder.layer.1"], ["layer.0", "layer.1"]),
        (["h.0.mlp", "h.11.mlp"], ["h.0", "h.11"]),
        (
            ["encoder.block.0.layer.1.ff", "decoder.block.0.layer.2.ff"],
            ["encoder.block.0.layer.1", "decoder.block.0.layer.2"],
        ),
        (["albert.encoder.group.0"], ["albert.encoder.group.0"]),
        (["a.b", "a.b.b"], ["b", "b.b"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_short_names(blocks, short):
    assert list(short_names(blocks).values()) == short
    assert list(short_names(blocks)) == blocks


@given(st.lists(st.text("ab0.", max_size=12), unique=True, max_size=5))
def test_short_names_stay_apart(blocks):
    assert len(set(short_names(blocks).values())) == len(blocks)


def test_a_name_that_is_too_long_loses_its_middle():
    assert short_names(["x" * 10 + "." + "y" * 30], width=11) == {"x" * 10 + "." + "y" * 30: "xxxxx…yyyyy"}
