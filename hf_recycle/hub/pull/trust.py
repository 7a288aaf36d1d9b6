"""Checks on the content of a pulled checkpoint, before the Trainer reads it. Nothing here executes what it reads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import safetensors
from transformers.trainer import TRAINER_STATE_NAME

from hf_recycle.errors import UserError, reason_of
from hf_recycle.hub.checks.configuration import configuration_problem
from hf_recycle.hub.checks.sizes import small_file_problem
from hf_recycle.hub.checks.state_files import check_state_file
from hf_recycle.hub.checks.trainer_state import trainer_state_problem
from hf_recycle.hub.pull.names import INDEX, STATE_FILES, WEIGHTS, is_one_of
from hf_recycle.records.files import RECYCLING_FILES
from hf_recycle.records.history import RecyclingHistory


def check_checkpoint(folder: Path, where: object) -> None:
    """Refuses a checkpoint folder with a damaged or hostile file.

    Checked are the files that a checkpoint of one process, of DDP or of FSDP with a full state dict consists of:
    state files must load with `weights_only=True` (no code is run, see `torch.load`) and take no more memory than room
    on the disk, weights be safetensors, JSON be finite numbers in their ranges, recycling files fit their schema and
    each other. Shards can't be looked at without unpickling them, so call `refuse_pickled` first.

    Args:
        folder: the checkpoint.
        where: what to call it in errors.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    shapes: set[tuple[int, ...]] = set()
    for path in sorted(folder.iterdir()):
        if is_one_of(WEIGHTS, path.name):
            _checked(where, path, lambda path: shapes.update(_shapes(path)))
    for path in sorted(folder.iterdir()):
        _checked(where, path, _check_size)
        if is_one_of(STATE_FILES, path.name):
            _checked(where, path, lambda path: check_state_file(path, shapes))
        elif path.name == INDEX:
            _checked(where, path, _check_index)
        elif path.name == TRAINER_STATE_NAME:
            _checked(where, path, _check_trainer_state)
        elif path.name == "config.json":
            _checked(where, path, lambda path: _refuse(configuration_problem(path)))
        elif path.suffix == ".json" and path.name not in RECYCLING_FILES:
            _checked(where, path, _read_json)
    if any((folder / name).exists() for name in RECYCLING_FILES):
        try:
            RecyclingHistory.from_pretrained(folder)
        except ValueError as error:
            raise UserError(f"{where}: {reason_of(error)}") from error


def read_step(path: Path, where: object) -> int:
    """The step of a `trainer_state.json` that was not checked yet.

    Raises:
        UserError: it is damaged.
    """
    _checked(where, path, _check_trainer_state)
    return _read_json(path)["global_step"]


def _checked(where: object, path: Path, check: Callable[[Path], Any]) -> None:
    try:
        check(path)
    except Exception as error:  # whatever a library says about content made to upset it
        raise UserError(
            f"{where}: {path.name} is not to be trusted or damaged ({reason_of(error)}); nothing of it was used"
        ) from error


def _check_size(path: Path) -> None:
    if path.is_file():
        _refuse(small_file_problem(path.name, path.stat().st_size))


def _shapes(path: Path) -> set[tuple[int, ...]]:
    with safetensors.safe_open(path, "pt") as weights:
        names = weights.keys()
        if not names:
            _bad("it holds no weights")
        return {tuple(weights.get_slice(name).get_shape()) for name in names}


def _check_index(path: Path) -> None:
    # The Trainer joins these names to the folder and opens what is there.
    shards = set(_read_json(path)["weight_map"].values())
    for name in shards:
        if not is_one_of(WEIGHTS, name):
            _bad(f"it names the shard {name[:80]!r}")
        if not (path.parent / name).is_file():
            _bad(f"its shard {name} is missing")


def _check_trainer_state(path: Path) -> None:
    _check_size(path)
    state = _read_json(path)
    _refuse(trainer_state_problem(state))
    named = re.fullmatch(r"checkpoint-([0-9]{1,18})", path.parent.name)
    if named and int(named[1]) != state["global_step"]:
        _bad(f"global_step is {state['global_step']} in a folder named {path.parent.name}")


def _read_json(path: Path) -> dict[str, Any]:
    # A loss may have been infinite or NaN, so these are allowed here and refused where they matter.
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        _bad("it is no JSON object")
    return value


def _refuse(problem: str | None) -> None:
    if problem is not None:
        _bad(problem)


def _bad(problem: str) -> NoReturn:
    raise ValueError(problem)
