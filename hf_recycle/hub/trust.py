"""Checks on the content of a pulled checkpoint, before the Trainer reads it. Nothing here executes what it reads."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from hf_recycle.errors import UserError
from hf_recycle.files import RECYCLING_FILES
from hf_recycle.history import RecyclingHistory
from hf_recycle.hub.names import INDEX, STATE_FILES, WEIGHTS, is_one_of

_MAX_STEPS = 2**53


def check_checkpoint(folder: Path, where: object) -> None:
    """Refuses a checkpoint folder with a damaged or hostile file.

    Checked are the files that a checkpoint of one process, of DDP or of FSDP with a full state dict consists of:
    state files must load with `weights_only=True` (no code is run, see `torch.load`), weights be safetensors, JSON be
    finite numbers in their ranges, recycling files fit their schema and each other. Shards can't be looked at without
    unpickling them, so call `refuse_pickled` first.

    Args:
        folder: the checkpoint.
        where: what to call it in errors.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    for path in sorted(folder.iterdir()):
        if is_one_of(STATE_FILES, path.name):
            _checked(where, path, _check_state_file)
        elif is_one_of(WEIGHTS, path.name):
            _checked(where, path, _check_weights)
        elif path.name == INDEX:
            _checked(where, path, _check_index)
        elif path.name == TRAINER_STATE_NAME:
            _checked(where, path, _check_trainer_state)
        elif path.suffix == ".json" and path.name not in RECYCLING_FILES:
            _checked(where, path, _read_json)
    if any((folder / name).exists() for name in RECYCLING_FILES):
        try:
            RecyclingHistory.from_pretrained(folder)
        except ValueError as error:
            raise UserError(f"{where}: {_first_line(error)}") from error


def _checked(where: object, path: Path, check: Callable[[Path], Any]) -> None:
    try:
        check(path)
    except Exception as error:  # whatever a library says about content made to upset it
        raise UserError(
            f"{where}: {path.name} is not to be trusted or damaged ({_first_line(error)}); nothing of it was used"
        ) from error


def _check_state_file(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        _bad("it is compressed, which torch.save never does")
    # Overlapping records would make a small file a large one in memory.
    if sum(record.file_size for record in records) > path.stat().st_size:
        _bad("its parts claim to be larger than the file")
    with safe_globals():
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        _bad(f"it holds a {type(state).__name__} where a mapping is expected")
    if path.name.startswith("optimizer") and not {"state", "param_groups"} <= set(state):
        _bad("it is no state of an optimizer")


def _check_weights(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as weights:
        if not weights.keys():
            _bad("it holds no weights")


def _check_index(path: Path) -> None:
    # The Trainer joins these names to the folder and opens what is there.
    shards = set(_read_json(path)["weight_map"].values())
    for name in shards:
        if not is_one_of(WEIGHTS, name):
            _bad(f"it names the shard {name[:80]!r}")
        if not (path.parent / name).is_file():
            _bad(f"its shard {name} is missing")


def _check_trainer_state(path: Path) -> None:
    state = _read_json(path)
    if unknown := set(state) - {item.name for item in fields(TrainerState)}:
        _bad(f"unknown key {sorted(unknown)[0][:80]!r}")
    for name in ("global_step", "max_steps", "num_input_tokens_seen"):
        if not (type(state.get(name, 0)) is int and 0 <= state.get(name, 0) < _MAX_STEPS):
            _bad(f"{name} is {_shown(state[name])}")
    for name in ("epoch", "total_flos", "num_train_epochs"):
        if not (_is_finite(state.get(name, 0)) and state.get(name, 0) >= 0):
            _bad(f"{name} is {_shown(state[name])}")
    for name in ("best_global_step", "train_batch_size"):
        if not (state.get(name) is None or (type(state[name]) is int and 0 <= state[name] < _MAX_STEPS)):
            _bad(f"{name} is {_shown(state[name])}")
    if not (state.get("best_metric") is None or _is_finite(state["best_metric"])):
        _bad(f"best_metric is {_shown(state['best_metric'])}")
    logs = state.get("log_history") or []
    if not (isinstance(logs, list) and all(isinstance(row, dict) for row in logs)):
        _bad("log_history is no list of rows")


def read_step(path: Path, where: object) -> int:
    """The step of a `trainer_state.json` that was not checked yet.

    Raises:
        UserError: it is damaged.
    """
    _checked(where, path, _check_trainer_state)
    return _read_json(path).get("global_step", 0)


def _read_json(path: Path) -> dict[str, Any]:
    # A loss may have been infinite or NaN, so these are allowed here and refused where they matter.
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        _bad("it is no JSON object")
    return value


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _bad(problem: str) -> NoReturn:
    raise ValueError(problem)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300].rstrip(". ") or type(error).__name__
