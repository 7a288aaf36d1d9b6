"""Isolated training: a stretch after which the main run goes on as if nothing had happened."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_recycle.utils.random_state import OwnRandomState


@contextmanager
def isolated_training(
    model: nn.Module, trained: Sequence[nn.Parameter], device: torch.device, seed: int
) -> Iterator[None]:
    """Within the context, `model` is in training mode, only the parameters `trained` require gradients, and random
    numbers come from `seed`. Afterwards the random states (Python's, numpy's, torch's on the CPU and on `device`),
    which parameters require gradients and which modules are in training mode are as they were, and there are no
    gradients.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    device_state = accelerator and accelerator.get_rng_state()
    try:
        with OwnRandomState(seed, once=True):
            if accelerator:
                accelerator.manual_seed(seed)
            model.train()
            if _can_freeze(model):
                mine = {id(parameter) for parameter in trained}
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in mine)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
        if accelerator:
            accelerator.set_rng_state(device_state)


def _can_freeze(model: nn.Module) -> bool:
    """Whether gradients that nobody uses can be left out. FSDP2 has settled which it reduces when it sharded the model,
    and a reentrant checkpoint none of whose inputs require gradients computes none at all."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return not sharded and not checkpointed
