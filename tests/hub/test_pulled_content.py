"""What `check_checkpoint` says of a pulled checkpoint with damaged or hostile content: one sentence."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pulled_runs import saved
from transformers.trainer_pt_utils import safe_globals

from hf_recycle.errors import UserError
from hf_recycle.hub.pull.trust import check_checkpoint


@pytest.fixture
def copy(pulled_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(pulled_checkpoint, tmp_path / "checkpoint-4"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": -1},
        {"global_step": float("nan")},
        {"global_step": 10**30},
        {"global_step": "4"},
        {"epoch": float("inf")},
        {"epoch": -1},
        {"max_steps": True},
        {"train_batch_size": -4},
        {"best_metric": "x"},
        {"log_history": {"a": 1}},
        {"log_history": [{"step": "x"}]},
        {"stateful_callbacks": {"a": 1}},
        {"best_model_checkpoint": 3},
        {"is_world_process_zero": "yes"},
        {"max_steps": 3},
        {"global_step": 3},
        {"surprise": 1},
    ],
)
def test_a_damaged_trainer_state(copy, changes):
    edit_json(copy / "trainer_state.json", **changes)
    with pytest.raises(UserError, match=rf"here: trainer_state\.json .*({next(iter(changes))}|of 3 steps)"):
        check_checkpoint(copy, "here")


@pytest.mark.parametrize("name", ["global_step", "max_steps", "epoch", "log_history"])
def test_a_trainer_state_without_what_is_read(copy, name):
    state = json.loads((copy / "trainer_state.json").read_text())
    del state[name]
    (copy / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=rf"here: trainer_state\.json .*{name} is missing"):
        check_checkpoint(copy, "here")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_trainer_state_that_is_none(copy, content):
    (copy / "trainer_state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"trainer_state\.json"):
        check_checkpoint(copy, "here")


def test_what_is_damaged_elsewhere_is_fine_before(copy):
    check_checkpoint(copy, "here")


def test_a_run_that_diverged_is_no_damage(copy):
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}]
    edit_json(copy / "trainer_state.json", log_history=rows)
    check_checkpoint(copy, "here")


def edit_saved(path: Path, **changes) -> None:
    with safe_globals():
        state = torch.load(path, weights_only=True)
    torch.save(state | changes, path)


def edit_optimizer(path: Path, **changes) -> None:
    """Changes the state of the first parameter."""
    state = torch.load(path, weights_only=True)
    state["state"][0] |= changes
    torch.save(state, path)


def edit_group(path: Path, **changes) -> None:
    state = torch.load(path, weights_only=True)
    state["param_groups"][0] |= changes
    torch.save(state, path)


def laughs() -> list:
    """A list of lists of lists, each written once and used ten times."""
    items: list = [0]
    for _ in range(15):
        items = [items] * 10
    return items


def deep() -> list:
    items: list = []
    for _ in range(100):
        items = [items]
    return items


def numpy_state(position: int) -> tuple:
    kind, words, *_ = np.random.RandomState(0).get_state()
    return kind, words, position, 0, 0.0


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def outside_shard(path: Path) -> None:
    path.rename(path.with_name("model-00001-of-00001.safetensors"))
    index = {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-7]), r"model\.safetensors"),
        ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), r"model\.safetensors"),
        ("model.safetensors", outside_shard, r"names the shard '\.\./\.\./secret"),
        ("optimizer.pt", compressed, "compressed"),
        ("optimizer.pt", lambda path: path.write_bytes(saved([1, 2])), "a list where a mapping"),
        ("optimizer.pt", lambda path: path.write_bytes(saved({"a": 1})), "no state of an optimizer"),
        ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "optimizer"),
        ("recycling_stats.json", lambda path: edit_json(path, ever_recycled=float("nan")), "recycling_stats"),
        ("recycling_stats.json", lambda path: edit_json(path, step=-4), "recycling_stats"),
        ("recycling_state.safetensors", lambda path: path.unlink(), r"recycling_state\.safetensors is missing"),
        ("config.json", lambda path: path.write_text("[]"), r"config\.json"),
        ("config.json", lambda path: edit_json(path, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, more"),
        ("config.json", lambda path: edit_json(path, text_config={"n_layer": 10**9}), "n_layer is 1000000000, more"),
        ("config.json", lambda path: edit_json(path, depths=[1] * 10**5), r"depths is \[1, 1"),
        ("config.json", lambda path: edit_json(path, num_labels=10**9), "num_labels is 1000000000, more"),
        (
            "config.json",
            lambda path: path.write_text(" " * 2**23 + "{}"),
            "8,388,610 bytes and such a",
        ),
        ("optimizer.pt", lambda path: edit_optimizer(path, exp_avg=torch.zeros(3)), r"exp_avg of parameter 0 .*\(3,\)"),
        ("optimizer.pt", lambda path: edit_optimizer(path, exp_avg=torch.zeros(0)), r"exp_avg of parameter 0 .*\(0,\)"),
        ("optimizer.pt", lambda path: edit_optimizer(path, exp_avg=5), "exp_avg of parameter 0 has shape int"),
        (
            "optimizer.pt",
            lambda path: edit_optimizer(path, more=torch.zeros(1).expand(2**40)),
            "larger than what is",
        ),
        ("optimizer.pt", lambda path: edit_optimizer(path, more=laughs()), "nested more than any state"),
        ("optimizer.pt", lambda path: edit_optimizer(path, more=deep()), "nested more than any state"),
        ("optimizer.pt", lambda path: edit_optimizer(path, more=torch.eye(3).to_sparse()), "layout torch.sparse"),
        ("optimizer.pt", lambda path: edit_group(path, lr=float("nan")), "setting that is not a number"),
        ("optimizer.pt", lambda path: edit_group(path, params=[0]), "in none of its groups"),
        ("scheduler.pt", lambda path: edit_saved(path, base_lrs=[float("nan")]), "setting that is not a number"),
        (
            "scheduler.pt",
            lambda path: edit_saved(path, base_lrs=torch.zeros(1).expand(2**40)),
            "larger than what is",
        ),
        ("rng_state.pth", lambda path: edit_saved(path, cpu=torch.zeros(3, dtype=torch.uint8)), r"rng_state\.pth"),
        ("rng_state.pth", lambda path: edit_saved(path, cpu=torch.zeros(5056, dtype=torch.uint8)), r"rng_state\.pth"),
        ("rng_state.pth", lambda path: edit_saved(path, python=(3, (1, 2), None)), r"rng_state\.pth"),
        ("rng_state.pth", lambda path: edit_saved(path, numpy=numpy_state(2**31 - 1)), "NumPy's generator"),
        ("rng_state.pth", lambda path: edit_saved(path, cuda=torch.zeros(2**10)), "'cuda' is no state"),
        ("rng_state.pth", lambda path: path.write_bytes(saved({"python": 1})), "lacks the state of cpu"),
    ],
)
def test_damaged_content(copy, name, damage, message):
    damage(copy / name)
    with pytest.raises(UserError, match=message) as error:
        check_checkpoint(copy, "here")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("here: ")
