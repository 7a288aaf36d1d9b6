"""Real matches: small trainings in processes of their own."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from support.scripts import forks

from benchmarks.__main__ import main
from benchmarks.contestant import OURS, STOCK, Contestant
from benchmarks.match import WARM_UP, hold_match
from benchmarks.memory import Memory
from benchmarks.shapes import TINY
from hf_recycle.errors import UserError

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """Trainings in processes that need not import everything again."""
    monkeypatch.setattr("benchmarks.match.multiprocessing", SimpleNamespace(get_context=lambda method: forks()))


def test_a_quick_run_fills_every_row(tmp_path, capsys):
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    rows = ["step", "memory", "recycling", "smooth", "midpoint", "magnitudes"]
    rows += ["probe", "probe-gradients", "obs", "data"]
    assert main([*rows, "--quick", "--rounds", "2", "--output", str(page), "--json", str(numbers)]) == 0
    assert page.read_text() == capsys.readouterr().out
    measured = {row["name"]: row for row in json.loads(numbers.read_text())["rows"]}
    assert list(measured) == rows
    assert all(row["verdict"] == "not judged" for row in measured.values())
    assert measured["step"]["samples"]["relative difference of losses"] < 1e-5
    seconds = measured["step"]["samples"]["seconds"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"stock": 2, "no method": 2, "everything": 2}
    assert all(second > 0 for taken in seconds.values() for second in taken)
    assert 0 < measured["data"]["value"]["median"] <= 1
    if sys.platform == "linux":
        assert all(mib > 1 for mib in measured["memory"]["samples"]["MiB"].values())


def test_a_quick_run_tells_tokens_per_second_and_memory_of_two_arms(tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    rows = ["causal-step", "causal-memory", "muon-step", "muon-memory"]
    assert main([*rows, "--quick", "--rounds", "2", "--json", str(numbers)]) == 0
    assert capsys.readouterr().out.count("tokens/s") == 2
    measured = {row["name"]: row for row in json.loads(numbers.read_text())["rows"]}
    assert list(measured) == rows
    assert {row["verdict"] for row in measured.values()} == {"not judged"}
    for name, arms in (("causal", {"whole", "chunks"}), ("muon", {"adamw_torch", "muon"})):
        seconds = measured[f"{name}-step"]["samples"]["seconds"]
        assert {arm: len(taken) for arm, taken in seconds.items()} == dict.fromkeys(arms, 2)
    assert measured["causal-step"]["samples"]["relative difference of losses"] < 1e-4


def test_a_match_tells_losses_apart_and_says_who_failed():
    same = [Contestant("one", STOCK, TINY), Contestant("two", OURS, TINY, {"deterministic_masking": False, "seed": 7})]
    turns = hold_match(same, rounds=2)
    assert [len(taken) for taken in turns.values()] == [WARM_UP + 2] * 2
    # Another seed, another model and other masks: what the check of the bench has to notice.
    assert max(abs(a.loss - b.loss) for a, b in zip(*turns.values(), strict=True)) > 1e-2

    with pytest.raises(UserError, match=r"the training 'broken' failed: .*recycle_fraction=7"):
        hold_match([Contestant("broken", OURS, TINY, {"recycle_steps": 1, "recycle_fraction": 7.0})], rounds=2)


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="reads the resident memory of Linux")
def test_peak_memory_above_the_idle_process():
    memory = Memory()
    memory.restart()
    before = memory.peak()
    block = torch.ones(64 * 2**18)  # 64 MiB
    del block
    assert 60 * 2**20 < memory.peak() - before < 80 * 2**20
