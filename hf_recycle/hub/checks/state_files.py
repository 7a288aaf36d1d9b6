"""Checks on files that the Trainer reads with `torch.load`: optimizer, scheduler, scaler and random states.

They are loaded with `weights_only=True` and mapped into memory, so no code is run and nothing large is copied. Whether
an optimizer's state is that of the model is asked when it is loaded, see `hf_recycle.engines.optimizer_checks`.
"""

import math
import random
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

_MAX_DEPTH = 20
# What optimizers keep with one entry for each of a parameter's.
_ELEMENTWISE = ("exp_avg", "max_exp_avg_sq", "momentum_buffer")

Shapes = Collection[tuple[int, ...]]


def check_state_file(path: Path, shapes: Shapes) -> None:
    """Refuses a state file with anything but plain values and tensors that lie in it entry by entry.

    Args:
        shapes: those of the checkpoint's weights; empty where they are not known.

    Raises:
        Exception: of many kinds, with what is wrong.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        _bad("it is compressed, which torch.save never does")
    size = path.stat().st_size
    # Overlapping records would make a small file a large one in memory.
    if sum(record.file_size for record in records) > size:
        _bad("its parts claim to be larger than the file")
    with safe_globals():
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        _bad(f"it holds a {type(state).__name__} where a mapping is expected")
    _Budget(size).spend(state)
    name = path.name
    if name.startswith("optimizer"):
        _check_optimizer(state, shapes)
    elif name.startswith("rng_state"):
        _check_random_state(state)
    elif name.startswith(("scheduler", "scaler")):
        _check_settings(state)


class _Budget:
    """What a file of some size may hold: as many bytes of tensors, and each value takes a byte of it at least, unless
    lists in lists are written once and used many times."""

    def __init__(self, size: int) -> None:
        self._bytes = size
        self._values = 4 * size

    def spend(self, value: Any, depth: int = 0) -> None:
        self._values -= 1
        if self._values < 0 or depth > _MAX_DEPTH:
            _bad("it is nested more than any state")
        if isinstance(value, Tensor | np.ndarray):
            self._spend_tensor(value)
        elif type(value) in (list, tuple, set):
            for item in value:
                self.spend(item, depth + 1)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.spend(key, depth + 1)
                self.spend(item, depth + 1)
        elif not (value is None or isinstance(value, bool | int | float | str | bytes | np.generic | np.dtype)):
            _bad(f"it holds a {type(value).__name__}")

    def _spend_tensor(self, tensor: Tensor | np.ndarray) -> None:
        if isinstance(tensor, Tensor):
            if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
                _bad(f"it holds a {type(tensor).__name__} of layout {tensor.layout}")
            there = tensor.untyped_storage().nbytes()
        else:
            there = tensor.nbytes
        taken = tensor.nbytes
        self._bytes -= taken
        if taken > there or self._bytes < 0:
            _bad(f"it holds a tensor of shape {tuple(tensor.shape)}, which is larger than what is stored of it")


def _check_optimizer(state: Mapping[str, Any], shapes: Shapes) -> None:
    groups, entries = state.get("param_groups"), state.get("state")
    if not (isinstance(groups, list) and isinstance(entries, Mapping)):
        _bad("it is no state of an optimizer")
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        _bad("its groups of parameters are none")
    known = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, int | str) for key in known) or not entries.keys() <= set(known):
        _bad("it holds a state of parameters that are in none of its groups")
    for group in groups:
        _check_settings({key: value for key, value in group.items() if key != "params"})
    for key, entry in entries.items():
        if not isinstance(entry, Mapping):
            _bad(f"its state of parameter {key!r:.40} is a {type(entry).__name__}")
        for name in _ELEMENTWISE if shapes else ():
            value = entry.get(name)
            if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) not in shapes):
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                _bad(f"{name} of parameter {key!r:.40} has shape {shown}, which no weight of the checkpoint has")


def _check_random_state(state: Mapping[str, Any]) -> None:
    if missing := sorted({"python", "numpy", "cpu"} - state.keys()):
        _bad(f"it lacks the state of {missing[0]}")
    # Generators of our own take the state on trial.
    random.Random().setstate(state["python"])
    kind, words, at, *_ = state["numpy"]
    # NumPy believes the position, and reads there.
    if kind != "MT19937" or len(words) != 624 or not 0 <= at <= 624:
        _bad("its state of NumPy's generator is none")
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])
    for name in state.keys() - {"python", "numpy", "cpu"}:  # of accelerators, which need not be here
        states = state[name] if isinstance(state[name], list) else [state[name]]
        if not all(isinstance(one, Tensor) and one.dtype == torch.uint8 and one.dim() == 1 for one in states):
            _bad(f"{name!r:.40} is no state of a generator")


def _check_settings(value: Any) -> None:
    """Refuses settings that are no finite numbers; infinity is how a scheduler calls the best so far at its start."""
    if isinstance(value, Mapping):
        for item in value.values():
            _check_settings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_settings(item)
    elif isinstance(value, Tensor):
        if value.numel() != 1:
            _bad(f"it holds a setting of shape {tuple(value.shape)}")
        _check_settings(value.item())
    elif isinstance(value, float) and math.isnan(value):
        _bad("it holds a setting that is not a number")


def _bad(problem: str) -> NoReturn:
    raise ValueError(problem)
