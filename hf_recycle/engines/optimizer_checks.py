"""Is a saved optimizer state that of this optimizer and model? Asked before the optimizer sees it.

PyTorch's optimizers believe what they load: with a state of another shape the fused ones read and write behind its end,
with other strides they mix up its entries, and a learning rate of NaN is a learning rate.
"""

import contextlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer import SCHEDULER_NAME

from hf_recycle.errors import UserError

# How a step is computed, not what it comes to.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
_NUMBER = (int, float)


def check_when_loaded(optimizer: Optimizer, scheduler: Any, model: nn.Module, checkpoint: str | None) -> None:
    """Refuses the state of a checkpoint that does not fit: the scheduler's now, the optimizer's when it is loaded.

    Args:
        optimizer: as Accelerate has wrapped it, or not. DeepSpeed's loads by itself and is left alone.
        checkpoint: the folder; None: there is nothing to load.

    Raises:
        UserError: in one sentence, what does not fit; from `optimizer.load_state_dict` too.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if checkpoint is None or not isinstance(inner, Optimizer):
        return
    path = Path(checkpoint, SCHEDULER_NAME)
    if path.is_file():
        check_scheduler_state(scheduler, torch.load(path, map_location="cpu", weights_only=True), str(path))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def check(optimizer: Optimizer, state: dict[str, Any]) -> None:
        handle.remove()
        check_optimizer_state(optimizer, state, names, f"The optimizer state in {checkpoint}")

    handle = inner.register_load_state_dict_pre_hook(check)


def check_optimizer_state(optimizer: Optimizer, saved: Any, names: Mapping[int, str], what: str) -> None:
    """Refuses a state that `optimizer.state_dict()` can't have given.

    Args:
        saved: the state; its parameters are numbered, or named, in the order of the optimizer's own.
        names: of the parameters, by `id`.
        what: what to call the state in errors.

    Raises:
        UserError: names the parameter or the setting, what was found and what is expected.
    """
    if not (isinstance(saved, Mapping) and {"state", "param_groups"} <= saved.keys()):
        raise UserError(f"{what} is no state of an optimizer: it is damaged, or another file")
    groups, now = saved["param_groups"], optimizer.param_groups
    sizes, expected = [_size(group) for group in _items(groups)], [len(group["params"]) for group in now]
    if sizes != expected:
        raise UserError(
            f"{what} is that of another model or optimizer: its groups have {sizes} parameters and those of this run "
            f"{expected}; resume with the model and the optimizer it was made with"
        )
    is_known = _known_class(optimizer) is type(optimizer)
    for old, new in zip(groups, now, strict=True):
        _check_settings(old, new, is_known, what)
    order = [key for group in groups for key in group["params"]]
    parameters = dict(zip(order, (p for group in now for p in group["params"]), strict=True))
    if not isinstance(saved["state"], Mapping) or not saved["state"].keys() <= parameters.keys():
        raise UserError(f"{what} holds a state for parameters that the model does not have")
    reference = _reference(optimizer)
    for key, entries in saved["state"].items():
        parameter = parameters[key]
        problem = _entries_problem(entries, parameter, reference.get(id(parameter), {}), is_known and bool(reference))
        if problem:
            name = names.get(id(parameter), f"parameter {key}")
            raise UserError(
                f"{what} does not fit {name}, of shape {tuple(parameter.shape)}: {problem}; resume with the model and "
                "the optimizer it was made with, or start a new run from its weights"
            )


def check_scheduler_state(scheduler: Any, saved: Any, what: str) -> None:
    """Refuses a state that the scheduler's `load_state_dict`, which takes every entry for an attribute, must not take.

    Raises:
        UserError: names the entry.
    """
    if not isinstance(saved, Mapping) or not all(isinstance(key, str) for key in saved):
        raise UserError(f"{what} holds no state of a scheduler: it is damaged, or another file")
    own = scheduler.state_dict()
    for key, value in saved.items():
        if key in ("last_epoch", "_step_count"):
            fits = type(value) is int and 0 <= value < 2**53
        elif key in own:
            fits = _is_alike(value, own[key])
        else:  # it must not hide a method, or the optimizer
            fits = not hasattr(scheduler, key) and (value is None or isinstance(value, bool | int | float | str))
        if not fits:
            raise UserError(
                f"{what} does not fit the scheduler of this run: {key} is {_shown(value)}"
                + (f" where something like {_shown(own[key])} is expected" if key in own else "")
            )


def _check_settings(old: Mapping[str, Any], new: Mapping[str, Any], is_known: bool, what: str) -> None:
    for key, value in new.items():
        if key == "params" or key in _IMPLEMENTATION:
            continue
        if key not in old:
            # A flag that a newer version has added gets its default, and a new scheduler its initial rate.
            fits = isinstance(value, bool) or not isinstance(value, int | float | tuple) or key == "initial_lr"
        elif isinstance(value, bool) and is_known:  # elsewhere it may tell what the optimizer is just doing
            fits = old[key] == value
        else:
            fits = _is_alike(old[key], value)
        if not fits:
            found = _shown(old[key]) if key in old else "missing"
            raise UserError(
                f"{what} was made with another optimizer: {key} is {found}, and {_shown(value)} in this run; resume "
                "with the optimizer it was made with"
            )


def _entries_problem(entries: Any, parameter: Tensor, reference: Mapping[str, Any], is_complete: bool) -> str | None:
    """What is wrong with the state of one parameter; None if nothing is.

    Args:
        reference: what the optimizer keeps of the parameter.
        is_complete: it keeps nothing else.
    """
    if not isinstance(entries, Mapping):
        return f"it is a {type(entries).__name__}"
    if is_complete and entries.keys() != reference.keys():
        return f"it holds {', '.join(map(str, entries)) or 'nothing'} where {', '.join(reference)} are expected"
    for key, value in entries.items():
        if key == "step" and not (_is_single(value) and 0 <= float(value) < 2**53):
            return f"its step is {_shown(value)}"
        if key not in reference and not _is_like_parameter(value, parameter):
            continue
        wanted = reference.get(key, parameter)
        if isinstance(wanted, Tensor) and wanted.dim():
            fits = isinstance(value, Tensor) and value.shape == wanted.shape and _strides(value) == _strides(wanted)
            fits = fits and (value.dtype == wanted.dtype or value.is_floating_point() == wanted.is_floating_point())
        else:
            fits = _is_single(value)
        if not fits:
            return f"its {key} is {_shown(value)} where {_shown(wanted)} is expected"
    return None


def _is_like_parameter(value: Any, parameter: Tensor) -> bool:
    """Whether an unknown optimizer keeps something that must have the parameter's shape. It may also keep numbers, row
    and column factors or the scales of blocks, which take less room and lie in it one after the other."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return False
    own = value.shape == parameter.shape and not value.is_floating_point()  # quantised
    return not (value.is_contiguous() and (own or 0 < value.numel() < max(parameter.numel(), 4096)))


def _reference(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """What the optimizer keeps of each parameter after a step, by the parameter's `id`; of optimizers that come from
    elsewhere (`_known_class`), or whose steps take more than gradients, nothing is known."""
    for device in ("meta", "cpu"):  # a few must look at numbers
        with contextlib.suppress(Exception):
            return _state_of_twin(optimizer, device)
    return {}


def _state_of_twin(optimizer: Optimizer, device: str) -> dict[int, dict[str, Any]]:
    """The state after one step of an optimizer of the same known class and settings, whose parameters are zero."""
    cls, defaults = _known_class(optimizer), optimizer.defaults
    if cls is None:
        return {}
    plain = {key: False for key in _IMPLEMENTATION if key in defaults}
    options = {key: defaults[key] for key in inspect.signature(cls).parameters if key in defaults} | plain
    twins: dict[int, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            twin = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device)
            twins[id(parameter)] = twin.zero_()
            twin.grad = torch.zeros_like(twin)
        groups.append({**group, **plain, "params": [twins[id(parameter)] for parameter in group["params"]]})
    stand_in = cls(groups, **options)
    stand_in.step()
    return {key: stand_in.state[twin] for key, twin in twins.items()}


def _known_class(optimizer: Optimizer) -> type[Optimizer] | None:
    """The class of the optimizer, or the nearest one it comes from, that PyTorch, transformers or this package
    defines."""
    libraries = ("torch.optim", "transformers.", "hf_recycle.")
    known = [cls for cls in type(optimizer).__mro__ if cls.__module__.startswith(libraries) and cls is not Optimizer]
    return known[0] if known else None


def _is_alike(found: Any, expected: Any) -> bool:
    """Whether two values of plain types have the same nesting and kinds, and the numbers are finite where they are
    expected to be."""
    if isinstance(expected, Tensor) or isinstance(found, Tensor):
        return _is_single(found) and (isinstance(expected, _NUMBER) or _is_single(expected))
    if isinstance(expected, bool) or expected is None:
        return found is None or found == {} or isinstance(found, bool | int | float | str)
    if isinstance(expected, _NUMBER):
        finite = isinstance(found, _NUMBER) and math.isfinite(found)
        return finite or (isinstance(found, float) and not math.isfinite(expected) and not math.isnan(found))
    if isinstance(expected, Mapping):
        if found is None:  # a schedule that is a function has no state
            return True
        same = isinstance(found, Mapping) and found.keys() == expected.keys()
        return same and all(_is_alike(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        same = isinstance(found, list | tuple) and len(found) == len(expected)
        return same and all(_is_alike(*pair) for pair in zip(found, expected, strict=True))
    return type(found) is type(expected)


def _is_single(value: Any) -> bool:
    """Whether it is one finite number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and math.isfinite(float(value))
    return isinstance(value, _NUMBER) and math.isfinite(value)


def _strides(tensor: Tensor) -> list[int]:
    """Those that matter: a dimension of one entry may have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _items(groups: Any) -> list[Any]:
    return groups if isinstance(groups, list) else []


def _size(group: Any) -> int | None:
    return len(_items(group.get("params"))) if isinstance(group, Mapping) else None


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:60]
    if value.numel() == 1:
        return f"{value.dtype} {value.item()}" if value.device.type != "meta" else "a number"
    return f"{value.dtype} of shape {tuple(value.shape)} with strides {tuple(value.stride())}"
