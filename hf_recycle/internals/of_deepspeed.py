"""What DeepSpeed keeps to itself: where ZeRO holds masters and optimizer states (seen in DeepSpeed 0.19.8).

The public `deepspeed.utils.safe_{get,set}_full_…` gather a whole parameter over all processes, and `safe_get_local_…`
copy what is offloaded to the accelerator: a phase that changes some lines of every parameter needs the values in place.
Nothing here imports DeepSpeed; what it needs is on the parameters.
"""

from typing import Any

import torch
from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether stage 3 has cut the parameter."""
    return hasattr(parameter, "ds_id")


def has_cut_master(parameter: Tensor) -> bool:
    """Whether stage 1 or 2 has cut the parameter's float32 master."""
    return hasattr(parameter, "_hp_mapping")


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also where stage 3 has emptied it."""
    return getattr(parameter, "ds_shape", parameter.shape)


# ---- Stages 1 and 2 ----


def fragment(parameter: Any, key: str | None = None) -> tuple[Tensor, int] | None:
    """This process' range of the flattened master, or of one optimizer state: `(values, start)`, in place. None if it
    holds nothing of the parameter, or has no such state of it."""
    mapping = parameter._hp_mapping
    if mapping is None or not (key is None or key in mapping.optim_fragment):
        return None
    return mapping.get_hp_fragment(key).detach(), mapping.lp_fragment_address.start


def state_keys(parameter: Any) -> set[str]:
    """The flattened optimizer states that this process holds for the parameter."""
    mapping = parameter._hp_mapping
    return set() if mapping is None else set(mapping.optim_fragment)


def replicated_group(optimizer: Any, parameter: Tensor) -> int:
    """The index of the parameter's group in the optimizer; -1 if it is in none."""
    groups = _zero_optimizer(optimizer).bit16_groups
    return next((i for i, group in enumerate(groups) if any(p is parameter for p in group)), -1)


def replicated_masters(optimizer: Any, parameter: Tensor) -> Tensor:
    """This process' part of the masters of the parameter's whole group, flat: what the optimizer steps."""
    return _zero_optimizer(optimizer).single_partition_of_fp32_groups[replicated_group(optimizer, parameter)]


def _zero_optimizer(optimizer: Any) -> Any:
    while not hasattr(optimizer, "bit16_groups"):
        optimizer = optimizer.optimizer  # the wrapper around it
    return optimizer


# ---- Stage 3 ----


def partition(parameter: Any) -> Tensor:
    """This process' partition of what the model computes with: flat, in place, padded in the last process."""
    return parameter.ds_tensor


def partitioned_group(parameter: Any) -> int:
    """The index of the parameter's group in the optimizer; -1 for one that was frozen from the start."""
    zero = getattr(parameter, "_z3_optimizer", None)
    return -1 if zero is None else zero.sub_group_to_group_id[_position(parameter)[0]]


def master(parameter: Any, key: str | None = None) -> Tensor:
    """This process' partition of the master, or of one optimizer state: flat, in place."""
    zero, flat = parameter._z3_optimizer, partitioned_masters(parameter)
    _, offset, length = _position(parameter)
    return (flat if key is None else zero.optimizer.state[flat][key]).detach().narrow(0, offset, length)


def master_state(optimizer: Any, parameter: Any) -> dict[str, Any]:
    """The optimizer's state of the group of masters that the parameter's lies in."""
    return optimizer.state.get(partitioned_masters(parameter), {})


def partitioned_masters(parameter: Any) -> Tensor:
    """This process' part of the masters of the parameter's whole subgroup, flat: what the optimizer steps."""
    return parameter._z3_optimizer.fp32_partitioned_groups_flat[_position(parameter)[0]]


def _position(parameter: Any) -> tuple[int, int, int]:
    """Subgroup, offset and length of the parameter's partition among the masters."""
    zero = parameter._z3_optimizer
    return zero.grad_position[zero.get_param_id(parameter)]


def refresh(parameter: Any) -> None:
    """Gathers a small parameter that stage 3 keeps gathered anew, as the engine does after a step."""
    if parameter.ds_persist and parameter.data.numel() == parameter.ds_numel:
        parameter.partition([parameter])
        parameter.all_gather([parameter])
