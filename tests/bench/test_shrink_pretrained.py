"""Losses of a tiny model without neurons against the curves of the package; what the table says of hand-made ones."""

import re

import pytest
import torch
from support.text_model import save_text_model
from transformers import AutoTokenizer

from benchmarks import shrink_pretrained
from benchmarks.shrink_pretrained import Removed, load, main, predict, remove, tables
from hf_recycle.analysis.pruning import PruneSettings, measure_curve
from hf_recycle.analysis.verdict import Cost
from hf_recycle.neurons.find import find_feed_forwards

SHARES = (0.25, 0.5)


@pytest.fixture
def folder(tmp_path):
    return save_text_model(tmp_path)


def words(folder, *more):
    return [str(folder), "--eval_file", str(folder.parent / "text.txt"), "--max_seq_length", "16", *more]


def test_losses_are_those_of_the_curves_and_the_model_stays(folder):
    subject = load(str(folder), str(folder.parent / "text.txt"), lines=8, length=16)
    before = {name: values.clone() for name, values in subject.model.state_dict().items()}
    found = dict(remove(subject, ["random", "obs"], ["none", "least_squares"], SHARES))
    assert all(torch.equal(values, before[name]) for name, values in subject.model.state_dict().items())
    blocks = find_feed_forwards(subject.model)
    for criterion in ("random", "obs"):
        for fold in ("none", "least_squares"):
            curve = measure_curve(subject, blocks, criterion, PruneSettings(shares=(0.0, *SHARES), fold=fold))
            for share, loss in zip(SHARES, curve[1:], strict=True):
                removed = found[criterion, fold, share]
                assert sum(removed.losses) / subject.tokens == pytest.approx(loss, rel=1e-9)
                assert removed.cost.mean == pytest.approx(loss - curve[0], rel=1e-6, abs=1e-9)


def test_a_line_is_a_sequence_and_those_looked_at_are_others(folder):
    text = folder.parent / "text.txt"
    subject = load(str(folder), str(text), lines=8, length=16)
    lines = AutoTokenizer.from_pretrained(folder)(text.read_text().splitlines()[:16])["input_ids"]
    seen = [
        batch["input_ids"].where(batch["labels"] == -100, batch["labels"])
        for part in (subject.batches, subject.others)
        for batch in part
    ]
    assert torch.cat(seen).tolist() == lines


def test_the_lowest_is_bold_and_what_can_not_be_told_from_it_has_a_star(folder):
    subject = load(str(folder), str(folder.parent / "text.txt"), lines=8, length=16)
    tokens = subject.batch_tokens()
    before = [1.0 * count for count in tokens]
    above = {"low_magnitude": (0.0, 0.0), "random": (0.6, -0.5), "obs": (0.3, 0.3)}  # in each of two batches
    found = {}
    for name, extra in above.items():
        losses = [loss + more * count for loss, more, count in zip(before, extra, tokens, strict=True)]
        found[name, "none", 0.5] = Removed(losses, Cost.paired(before, losses, tokens), 0.25)
    lines = [line.split("|") for line in tables(subject, found)[0].splitlines()[2:]]
    rows = {cells[1].strip(): cells[2].strip() for cells in lines}
    assert rows["low_magnitude"] == "**1.000**"
    assert re.fullmatch(r"\d\.\d+\\\*", rows["random"])
    assert rows["obs"] == "1.300"


def test_what_is_named_right_is_counted(folder):
    subject = load(str(folder), str(folder.parent / "text.txt"), lines=8, length=16)
    losses, right = predict(subject)
    assert losses == pytest.approx(subject.batch_losses(), rel=1e-6)
    hits = [
        bool(subject.model(batch["input_ids"]).logits[row, column].argmax() == label)
        for batch in subject.batches
        for row, labels in enumerate(batch["labels"].tolist())
        for column, label in enumerate(labels)
        if label != -100
    ]
    assert right == pytest.approx(sum(hits) / len(hits))


def test_the_command_prints_a_table_and_the_speed(folder, capsys, monkeypatch):
    widths = []
    original = shrink_pretrained.shrink
    monkeypatch.setattr(shrink_pretrained, "shrink", lambda *a: widths.append(original(*a)) or widths[-1])
    assert main(words(folder, "--lines", "8", "--criteria", "random,flap", "--folds", "none,mean")) == 0
    printed = capsys.readouterr().out
    assert [shrunk.d_ff for shrunk in widths] == [32, 24]  # multiples of 8, of 40
    assert re.search(r"^\| criterion \| 25%, none \| 25%, mean \| 50%, none \| 50%, mean \|$", printed, re.MULTILINE)
    assert printed.count("| flap |") == 2  # losses, and tokens named right
    assert printed.count("x as fast") == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lines", "20"], "27 lines"),
        (["--lines", "4"], "lines=4"),
        (["--criteria", "rnadom"], "random"),
        (["--folds", "medium"], "folds='medium'"),
    ],
)
def test_what_it_can_not_measure_is_refused(folder, capsys, more, said):
    assert main(words(folder, *more)) != 0
    assert said in capsys.readouterr().err
