"""Layers that compute W x + b, whatever their class: which dimension of the weight is what."""

import math

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_recycle.neurons.slices import full_shape


def is_linear(module: nn.Module | None) -> bool:
    """Whether a neuron's weights can be read from and written to the module's weight: a linear layer, or a convolution
    of one position at a time over all channels."""
    if not isinstance(module, nn.Linear | Conv1D) and not _is_pointwise(module):
        return False
    # A quantised layer's integer weights are no place to write a fresh neuron to, and a baseline without feed-forward
    # neurons has layers without weights.
    return module.weight.is_floating_point() and all(full_shape(module.weight))


def _is_pointwise(module: nn.Module | None) -> bool:
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d)
        and math.prod((*module.kernel_size, *module.stride)) * module.groups == 1
    )


def out_dim(linear: nn.Module) -> int:
    """The dimension of the weight that counts outputs."""
    return 1 if isinstance(linear, Conv1D) else 0


def out_features(linear: nn.Module) -> int:
    """Number of outputs."""
    return full_shape(linear.weight)[out_dim(linear)]


def in_features(linear: nn.Module) -> int:
    """Number of inputs."""
    return full_shape(linear.weight)[1 - out_dim(linear)]
