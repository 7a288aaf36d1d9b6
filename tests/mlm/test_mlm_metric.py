"""Masked accuracy against a naive count, offline and in several processes at once."""

import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from hf_recycle.mlm.metric import MaskedAccuracy


def naive(predictions, references) -> float:
    return sum(int(p) == int(r) for p, r in zip(predictions, references, strict=True)) / len(references)


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, 500), rng.integers(0, 3, 500)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_equals_a_naive_count(tokens, kind):
    predictions, references = (kind(t) for t in tokens)
    result = MaskedAccuracy().compute(predictions=predictions, references=references)
    assert result == {"accuracy": naive(*tokens)}
    assert 0.2 < result["accuracy"] < 0.5
    assert isinstance(result["accuracy"], float)


def test_batches_add_up(tokens):
    metric = MaskedAccuracy()
    assert isinstance(metric, evaluate.Metric)
    for start, stop in ((0, 7), (7, 7), (7, 300), (300, 499)):
        metric.add_batch(predictions=tokens[0][start:stop], references=tokens[1][start:stop])
    metric.add(prediction=tokens[0][499], reference=tokens[1][499])
    assert metric.compute() == {"accuracy": naive(*tokens)}
    # and the next evaluation starts from nothing
    assert metric.compute(predictions=[1, 2], references=[1, 3]) == {"accuracy": 0.5}


def test_nothing_is_not_a_number():
    metric = MaskedAccuracy()
    assert math.isnan(metric.compute()["accuracy"])
    assert math.isnan(metric.compute(predictions=[], references=[])["accuracy"])
    metric.add_batch(predictions=[], references=[])
    assert math.isnan(metric.compute()["accuracy"])
    assert metric.compute(predictions=[5], references=[5]) == {"accuracy": 1.0}


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="Mismatch"):
        MaskedAccuracy().compute(predictions=[1, 2], references=[1])


def test_on_disk_too(tmp_path, tokens):
    metric = MaskedAccuracy(keep_in_memory=False, cache_dir=str(tmp_path))
    assert metric.compute(predictions=tokens[0], references=tokens[1]) == {"accuracy": naive(*tokens)}


SCRIPT = """
import socket
def refuse(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = refuse
from hf_recycle.mlm.metric import MaskedAccuracy
metric = MaskedAccuracy()
for i in range(200):
    metric.add_batch(predictions=[i, 0], references=[i, 1])
print(metric.compute()["accuracy"], metric.compute(predictions=[3], references=[3])["accuracy"])
"""


@pytest.mark.long
def test_offline_in_several_processes_with_no_home_to_write_to(tmp_path):
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {
        "HF_EVALUATE_CACHE": str(home),
        "HF_METRICS_CACHE": str(home),
        "HF_MODULES_CACHE": str(home),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.split() == ["0.5", "1.0"]
    assert not list(home.rglob("*.arrow"))
    assert not list(home.rglob("*masked_accuracy*"))
