"""FF activations that are computed again in the backward pass rather than kept for it.

The out-projection needs its input, the activations, for the gradient of its weights; the activation function needs its
own input, the pre-activations, for its derivative. Both are `(tokens, d_ff)`, the largest arrays of a layer, and the
first is the function of the second: one of them is enough. (Selective activation recomputation: Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models".)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from hf_recycle.neurons.blocks import FeedForward


class Recomputation:
    """Lets `blocks` keep pre-activations only. Loss and gradients stay the same to the bit.

    A block is left as it is where something lies between the activation function and the out-projection (dropout, the
    other half of a gated block), or where torch takes the derivative from the activations themselves (ReLU).
    """

    def __init__(self, blocks: Sequence[FeedForward]) -> None:
        self._handles = []
        for out in dict.fromkeys(block.out_slice.module for block in blocks):
            block = _Block()
            self._handles += [
                out.register_forward_pre_hook(block.begin),
                # Also where the projection fails: hooks on saved tensors are global, and must not stay.
                out.register_forward_hook(block.end, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class _Block:
    """The hooks of one out-projection, around its forward pass.

    Attributes:
        compute: gives the activations that are the projection's input; None outside of a forward pass, and where they
            are kept.
        place: address and number of elements of these activations.
    """

    def __init__(self) -> None:
        self.compute: Callable[[], Tensor] | None = None
        self.place: tuple[int, int] | None = None
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def begin(self, out: nn.Module, args: tuple) -> None:
        activations = args[0]
        self.compute = _function_of(activations)
        if self.compute is not None:
            self.place = activations.data_ptr(), activations.numel()
            self._hooks.__enter__()

    def end(self, out: nn.Module, args: tuple, output: Tensor) -> None:
        if self.compute is not None:
            self.compute = None
            self._hooks.__exit__(None, None, None)

    def _pack(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        # The projection saves its weights too; its input, as rows.
        if (saved.data_ptr(), saved.numel()) != self.place:
            return saved
        return partial(_compute, self.compute, saved.shape)


def _compute(function: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    return function().view(shape)


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()


def _function_of(activations: Tensor) -> Callable[[], Tensor] | None:
    """How to compute `activations` again from what is kept anyway, told from how autograd got them."""
    node = activations.grad_fn
    match node.name() if node is not None else None:
        case "GeluBackward0":
            return partial(F.gelu, node._saved_self, approximate=node._saved_approximate)
        case "SiluBackward0":
            return partial(F.silu, node._saved_self)
    return None
