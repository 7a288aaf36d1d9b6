"""Smooth recycling: x = α·x_new + (1 − α)·stop_grad(x_old) (*Neuron Recycling*, section "Smooth recycling").

Instead of a reparametrised forward pass, the parameter holds the effective x. Before an optimizer step the gradient of
x becomes that of x_new (times α) and x_new takes x's place; after it, x_new is read back and mixed with x_old. That is
the explicit parametrisation exactly, clipping included, when gradients are scaled before their norm is taken.
"""

import torch
from torch import Tensor


def interpolation(age: Tensor, steps: int) -> Tensor:
    """α after `age` `(n,)` optimizer steps of a transition over `steps`: min(1, age / steps), float64 `(n,)`."""
    return (age.to(torch.float64) / steps).clamp(max=1.0)


def mix(new: Tensor, old: Tensor, alpha: Tensor) -> Tensor:
    """α·new + (1 − α)·old for `new`, `old` `(n, width)` or `(n,)` and `alpha` `(n,)`; exactly `new` where α is 1 and
    exactly `old` where α is 0. Computed in float32 at least, returned in the dtype of `new`."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    alpha = alpha.to(device=new.device, dtype=dtype).reshape(-1, *[1] * (new.dim() - 1))
    return (alpha * new.to(dtype)).add_((1 - alpha) * old.to(dtype)).to(new.dtype)
