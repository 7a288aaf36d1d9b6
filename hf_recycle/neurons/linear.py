"""Layers that compute W x + b, whatever their class: which dimension of the weight is what."""

import math
from typing import TypeGuard, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_recycle.neurons.slices import full_shape


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a neuron's weights can be read from and written to the module's weight: a linear layer, or a convolution
    of one position at a time over all channels."""
    if module is None or (not isinstance(module, nn.Linear | Conv1D) and not _is_pointwise(module)):
        return False
    # A quantised layer's integer weights are no place to write a fresh neuron to, and a baseline without feed-forward
    # neurons has layers without weights.
    return _weight(module).is_floating_point() and all(full_shape(_weight(module)))


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d)
        and math.prod((*module.kernel_size, *module.stride)) * module.groups == 1
    )


def _weight(linear: nn.Module) -> Tensor:
    return cast(Tensor, linear.weight)


def out_dim(linear: nn.Module) -> int:
    """The dimension of the weight that counts outputs."""
    return 1 if isinstance(linear, Conv1D) else 0


def out_features(linear: nn.Module) -> int:
    """Number of outputs."""
    return full_shape(_weight(linear))[out_dim(linear)]


def in_features(linear: nn.Module) -> int:
    """Number of inputs."""
    return full_shape(_weight(linear))[1 - out_dim(linear)]
