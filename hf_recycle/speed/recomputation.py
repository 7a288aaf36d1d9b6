"""FF activations that are computed again in the backward pass rather than kept for it.

The out-projection needs its input, the activations, for the gradient of its weights; the activation function needs its
own input, the pre-activations, for its derivative. Both are `(tokens, d_ff)`, the largest arrays of a layer, and the
first is the function of the second: one of them is enough. (Selective activation recomputation: Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models".)

A step of BERT Medium (32 × 128 tokens) allocates 1,411 instead of 1,640 MiB beyond weights and optimizer
(`python -m benchmarks.allocations`); its time stays within the spread of the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from hf_recycle.internals.of_torch import keeps_saved_tensors, saved_approximation, saved_input, version_of
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.utils.forwards import Forward


def recomputing_forwards(
    blocks: Sequence[FeedForward], forwards: Mapping[nn.Module, Forward]
) -> dict[nn.Module, Forward]:
    """For the out-projections of `blocks`, on top of those that `forwards` has for them."""
    modules = dict.fromkeys(block.out_slice.module for block in blocks)
    return {module: Recomputation(forwards.get(module, module.forward)) for module in modules}


class Recomputation(Forward):
    """The forward of an out-projection that keeps pre-activations only. Loss and gradients stay the same to the bit.

    A block keeps what it would keep anyway where something lies between the activation function and the out-projection
    (dropout, the other half of a gated block, a change in place), where torch takes the derivative from the activations
    themselves (ReLU), in compiled code, and where others decide what is kept (`torch.utils.checkpoint`,
    `saved_tensors_hooks`, transforms of `torch.func`).
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compute = None if torch.compiler.is_compiling() or not keeps_saved_tensors() else _function_of(*args[:1])
        if compute is None:
            return self.original(*args, **kwargs)
        with saved_tensors_hooks(partial(_pack, _identity(args[0]), compute), _unpack):
            return self.original(*args, **kwargs)


def _pack(activations: _Identity, compute: Callable[[], Tensor], saved: Tensor) -> Tensor | Callable[[], Tensor]:
    # The projection saves its weights too; its input, as rows.
    if _identity(saved) != activations or not saved.is_contiguous():
        return saved
    return partial(_compute, compute, saved.shape)


_Identity = tuple[int, int, torch.dtype]


def _identity(values: Tensor) -> _Identity:
    """Address, number of elements and dtype."""
    return values.data_ptr(), values.numel(), values.dtype


def _compute(function: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    return function().view(shape)


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()


def _function_of(activations: object = None) -> Callable[[], Tensor] | None:
    """How to compute `activations` again from what is kept anyway, told from how autograd got them; None if they have
    been changed since, or do not lie in memory row after row."""
    if type(activations) is not Tensor or version_of(activations) or not activations.is_contiguous():
        return None
    node = activations.grad_fn
    match node.name() if node is not None else None:
        case "GeluBackward0":
            return partial(F.gelu, saved_input(node), approximate=saved_approximation(node))
        case "SiluBackward0":
            return partial(F.silu, saved_input(node))
    return None
