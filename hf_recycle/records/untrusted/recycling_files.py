"""Checks on recycling files of unknown origin: what they take to read, and whether their numbers are possible."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from hf_recycle.hub.checks.sizes import small_file_problem
from hf_recycle.records.file_checks import fail
from hf_recycle.records.untrusted.history_rows import check_rows
from hf_recycle.records.untrusted.parquet_size import parquet_problem

_HISTORY, _STATE = "recycling_history.parquet", "recycling_state.safetensors"
_MIB = 2**20
_MAX_BLOCKS = 10_000


def check_expansion(folder: Path) -> None:
    """Refuse recycling files that are too large, or would be once they are read. To be called before they are.

    The rows of a long run compress well, those of a short one take little room however they are written. So a small
    history may expand to 256 MiB, and a large one to a hundred times its size, up to 2 GiB.

    Raises:
        RecyclingFileError: names the file and what it claims.
    """
    for path in folder.glob("recycling_*"):
        if problem := small_file_problem(path.name, path.stat().st_size):
            fail(path, problem)
    path = folder / _HISTORY
    if path.is_file() and (problem := parquet_problem(path, min(256 * _MIB + 100 * path.stat().st_size, 2048 * _MIB))):
        fail(path, problem)


def check_content(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    table: pa.Table,
    stats: Mapping[str, Any],
) -> None:
    """Refuse numbers that no run can have written, in files that `hf_recycle.records.files` has read.

    Raises:
        RecyclingFileError: names the file and what is wrong.
    """
    if len(config["blocks"]) > _MAX_BLOCKS:
        fail(folder, f"its configuration lists {len(config['blocks']):,} blocks")
    check_rows(folder / _HISTORY, table, config["blocks"])
    if len(table) and (latest := int(table["step"].to_numpy().max())) > stats["step"]:
        fail(folder / _HISTORY, f"it records step {latest} and the summary was made at step {stats['step']}")
    _check_counters(folder / _STATE, config, tensors, stats)
    fading_in = sum(_check_fade_in(folder / _STATE, block, config, tensors, stats) for block in config["blocks"])
    if fading_in != stats["neurons"]["fading_in"]:
        fail(folder, f"{fading_in} neurons are fading in and the summary says otherwise")


def _check_counters(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], stats: Mapping[str, Any]
) -> None:
    for key in (key for key in tensors if key.startswith("trainer/")):
        value = tensors[key]
        is_loss = key.endswith("loss") and value.is_floating_point() and value.numel() == 1
        if not (is_loss or (value.numel() == 1 and value.dtype == torch.int64 and int(value) >= 0)):
            fail(path, f"{key} is no whole number from 0")
    # Every phase that was not skipped is in the history, whose number of phases the summary was compared with.
    most = stats["phases"]
    if (told := int(tensors.get("trainer/phases", torch.tensor([most])))) != most:
        fail(path, f"trainer/phases is {told} and the history holds {most} phases")
    if (skipped := int(tensors.get("trainer/skipped_steps", torch.zeros(1)))) > stats["step"]:
        fail(path, f"trainer/skipped_steps is {skipped} after {stats['step']} steps")
    for block in config["blocks"]:
        for kind, limit, unit in (("counts", most, "phases"), ("last_step", stats["step"], "steps")):
            if (largest := int(tensors[f"{block['name']}/{kind}"].max())) > limit:
                fail(path, f"{kind} of block {block['name']} holds {largest} after {limit} {unit}")


def _check_fade_in(
    path: Path,
    block: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    stats: Mapping[str, Any],
) -> int:
    """Checks the neurons of a block that are fading in; returns how many they are."""
    name, prefix = block["name"], f"{block['name']}/fade_in/"
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not found:
        return 0
    for key in ("index", "age"):
        values = found.get(key)
        if values is None or values.dtype != torch.int64 or values.dim() != 1 or not len(values):
            fail(path, f"the {key} of the fade-ins of block {name} is missing or has the wrong type")
    index, age = found.pop("index"), found.pop("age")
    if not (((index >= 0) & (index < block["num_neurons"])).all() and len(index.unique()) == len(index)):
        fail(path, f"the fade-ins of block {name} name neurons twice, or that it does not have")
    # A neuron leaves its fade-in at the end, and an optimizer takes at most one step in one of the Trainer's.
    since = stats["step"] - tensors[f"{name}/last_step"][index]
    steps = config["arguments"].get("recycle_smooth_steps")
    beyond = age >= steps if isinstance(steps, int | float) and steps >= 1 else torch.zeros_like(age, dtype=torch.bool)
    if len(age) != len(index) or (age < 0).any() or (age > since).any() or beyond.any():
        fail(path, f"the fade-ins of block {name} have ages that no fade-in can have")
    for key, values in found.items():
        side, _, role = key.partition("/")
        other = found.get(f"{'new' if side == 'old' else 'old'}/{role}")
        if side not in ("old", "new") or other is None or other.shape != values.shape:
            fail(path, f"{prefix}{key} has no weights on the other side of the fade-in")
        if not (values.is_floating_point() and values.shape[:1] == index.shape and values.isfinite().all()):
            fail(path, f"{prefix}{key} holds no finite weights for {len(index)} neurons")
    return len(index)
