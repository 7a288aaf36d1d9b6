"""The summary against a naive count."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recycle.records.files import read_stats, write_stats
from hf_recycle.records.recorder import BlockRecord, HistoryRecorder
from hf_recycle.records.summary import summarize

BLOCKS = st.dictionaries(
    st.sampled_from(["layer.0", "layer.1", "z"]), st.lists(st.integers(0, 9), min_size=1, max_size=30)
)


@settings(max_examples=60, deadline=None)
@given(BLOCKS)
def test_counts_agree_with_a_naive_computation(counts):
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in counts.items()}
    stats = summarize(tensors, {}, HistoryRecorder(), step=7, fading_in=2, immune=3)
    everything = [value for values in counts.values() for value in values]
    assert stats["neurons"] == {
        "total": len(everything),
        "ever_recycled": sum(value > 0 for value in everything),
        "share_ever_recycled": sum(value > 0 for value in everything) / max(1, len(everything)),
        "pruned": 0,
        "fading_in": 2,
        "immune": 3,
    }
    assert stats["recycling_events"] == sum(everything)
    assert stats["times_recycled"] == {str(k): n for k, n in Counter(everything).items()}
    assert [block["name"] for block in stats["blocks"]] == list(counts)
    for block, values in zip(stats["blocks"], counts.values(), strict=True):
        assert block["times_recycled"] == {str(k): n for k, n in Counter(values).items()}
        assert block["ever_recycled"] == sum(value > 0 for value in values)
        assert block["recycling_events"] == sum(values)
        assert block["magnitude_quantiles"] is None
    json.dumps(stats, allow_nan=False)


def test_losses_phases_and_magnitudes(tmp_path):
    recorder = HistoryRecorder()
    for step, loss in ((1, 5.0), (2, 2.0), (3, float("nan")), (4, 3.0)):
        recorder.log(step, {"loss": loss, "learning_rate": 0.1})
    recorder.log(4, {"eval_loss": 2.5, "eval_accuracy": 0.25})
    recorder.log(8, {"eval_loss": float("nan"), "eval_accuracy": 0.5})
    recorder.phase(BlockRecord(2, "a", 1, 2, [0], phase=1))
    recorder.phase(BlockRecord(2, "b", 1, 2, [0], phase=1))
    recorder.phase(BlockRecord(4, "a", 1, 2, [0], phase=2))
    counts = {"a": torch.tensor([2, 0]), "b": torch.tensor([1, 0])}
    magnitudes = {"a": torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "b": torch.tensor([np.nan, np.inf])}
    stats = summarize(counts, magnitudes, recorder, step=8, extra={"tokens": 12})
    assert stats["step"] == 8
    assert stats["phases"] == 2
    assert stats["losses"]["loss"] == {
        "first": 5.0,
        "first_step": 1,
        "last": 3.0,
        "last_step": 4,
        "best": 2.0,
        "best_step": 2,
    }
    assert stats["losses"]["eval_loss"]["best_step"] == 4
    assert stats["eval_accuracy"]["best"] == 0.5
    assert stats["extra"] == {"tokens": 12}
    assert stats["blocks"][0]["magnitude_quantiles"]["0.25"] == pytest.approx(1.5)
    assert list(stats["blocks"][0]["magnitude_quantiles"])[:3] == ["0", "0.01", "0.05"]
    assert stats["blocks"][1]["magnitude_quantiles"] is None
    write_stats(tmp_path, stats)
    assert read_stats(tmp_path)["losses"]["eval_loss"]["last"] is None


def test_a_loss_that_was_never_finite_has_no_best():
    recorder = HistoryRecorder()
    recorder.log(1, {"loss": float("inf")})
    loss = summarize({}, {}, recorder, step=1)["losses"]["loss"]
    assert loss["best"] is loss["best_step"] is None
