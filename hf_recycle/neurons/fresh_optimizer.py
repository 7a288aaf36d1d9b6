"""An optimizer like the main one, without its memories."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from hf_recycle.neurons.optimizer_state import unwrap_optimizer

# What a parameter group holds beside hyper-parameters.
_NOT_HYPER_PARAMETERS = ("params", "param_names", "initial_lr")


def fresh_optimizer(optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """A new optimizer of the same class with the same hyper-parameters, learning rates as they are now included, over
    those of the parameters that `optimizer` (wrapped or not) optimizes.

    Raises:
        ValueError: if none of them is optimized, or the class can't be made from its parameter groups.
    """
    inner = unwrap_optimizer(optimizer)
    wanted = {id(parameter) for parameter in parameters}
    groups = []
    for group in inner.param_groups:
        mine = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if mine:
            groups.append({k: v for k, v in group.items() if k not in _NOT_HYPER_PARAMETERS} | {"params": mine})
    if not groups:
        raise ValueError("overtrain_steps finds no feed-forward weight that the optimizer trains: unfreeze some.")
    accepted = inspect.signature(type(inner)).parameters
    defaults = {name: value for name, value in inner.defaults.items() if name in accepted}
    try:
        for group in groups:
            group["lr"] = float(group["lr"])  # a schedule may change a tensor in place
        return type(inner)(groups, **defaults)
    except Exception as error:
        raise ValueError(
            f"overtrain_steps needs a fresh optimizer of the same kind each time, and {type(inner).__name__} can't be "
            f"made from its parameter groups ({error}): use another, such as optim=adamw_torch."
        ) from error
