"""The optimizer's state in a checkpoint of another engine.

A single process and DDP number the parameters, in the order of the optimizer; FSDP2 names them, and cuts their state
over files if its state dicts are sharded. DeepSpeed's files are its own: see `engine_checkpoints`.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_recycle.engines.plain_weights import cut_like

OPTIMIZER_FILES = PLAIN, FULL, SHARDED = "optimizer.pt", "optimizer.bin", "optimizer_0"


def load_optimizer(optimizer, model: nn.Module, folder: Path, aliases: Mapping[str, str]) -> None:
    """Loads the optimizer's state from the files of whichever engine, if there are any.

    Each process reads the files; mapped into memory where they are whole.

    Args:
        optimizer: of this engine, wrapped or not.
        aliases: see `load_plain_weights`.

    Raises:
        ValueError: if the state is that of another optimizer or model.
    """
    if not any(Path(folder, name).exists() for name in OPTIMIZER_FILES):
        return
    saved = read_optimizer(folder)
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    position = {id(parameter): number for number, parameter in enumerate(parameters)}

    def number(key: int | str) -> int:
        found = key if isinstance(key, int) else position.get(id(named.get(aliases.get(key, key))), -1)
        if not 0 <= found < len(parameters):
            raise ValueError(f"The optimizer in {folder} is not that of the model: it has a state for {key!r}.")
        return found

    groups = [sorted(map(number, group["params"])) for group in saved["param_groups"]]
    if groups != _numbered_groups(optimizer):
        raise ValueError(f"The optimizer in {folder} has other groups of parameters than the one of this run.")
    state = {number(key): _cut(entries, parameters[number(key)]) for key, entries in saved["state"].items()}
    settings = [{**old, "params": numbers} for old, numbers in zip(saved["param_groups"], groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _numbered_groups(optimizer) -> list[list[int]]:
    numbers = itertools.count()
    return [[next(numbers) for _ in group["params"]] for group in optimizer.param_groups]


def _cut(entries: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {
        key: cut_like(parameter, value) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in entries.items()
    }


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The optimizer's state in a checkpoint of one process, DDP or FSDP2, whole and on the CPU: a state dict whose
    parameters are numbered, or named by FSDP2."""
    for name in (PLAIN, FULL):
        if Path(folder, name).is_file():
            return torch.load(Path(folder, name), map_location="cpu", mmap=True, weights_only=True)
    return _read_sharded(Path(folder, SHARDED))


def _read_sharded(folder: Path) -> dict[str, Any]:
    """A sharded optimizer state as if it had been written whole."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    flat: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(flat, storage_reader=reader, no_dist=True)
    state: dict[str, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for key, (_, part, owner, entry) in metadata.planner_data.items():
        (state if part == "state" else groups).setdefault(owner, {})[entry] = flat[key]
    return {"state": state, "param_groups": [groups[number] for number in sorted(groups)]}
