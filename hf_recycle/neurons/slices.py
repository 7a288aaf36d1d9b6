"""Where the lines of a parameter lie that belong to the neurons of a block."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_recycle.internals import of_deepspeed


@dataclass(frozen=True)
class ParameterSlice:
    """`length` lines of one parameter, one for each neuron: rows of `W_in`, entries of `b_in`, columns of `W_out`.

    The parameter is looked up in its module at every use, because sharding replaces parameter objects.

    Attributes:
        role: "in", or "gate" and "up"; the same with ".bias"; "out"; "" for a whole parameter.
        module: the linear layer, or the module that holds the weights of all experts.
        attribute: the parameter's name there.
        dim: the dimension of the matrix along which neurons are counted.
        offset: where neuron 0 lies on that dimension (`d_ff` for the second half of a fused gated matrix).
        length: `d_ff`.
        stride: how far a neuron lies from the one before (2 in a fused matrix whose halves are interleaved).
        expert: where a parameter holds one matrix for each expert, one behind the other: the number of the expert.
    """

    role: str
    module: nn.Module = field(repr=False)
    attribute: str
    dim: int
    offset: int
    length: int
    stride: int = 1
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def is_bias(self) -> bool:
        return self.role.endswith(".bias")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the slice is cut from: of an expert its own, of a 1 × 1 convolution
        (output, input) channels, of a bias a column, of a single number itself."""
        rows, *columns = full_shape(self.parameter)[0 if self.expert is None else 1 :] or (1,)
        return rows, math.prod(columns)

    @property
    def first_row(self) -> int:
        """Where that matrix begins in the parameter, counted in rows of it."""
        return 0 if self.expert is None else self.expert * self.matrix_shape[0]

    @property
    def width(self) -> int:
        """Weights of a neuron in this slice; 1 for a bias."""
        return self.matrix_shape[1 - self.dim]

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return self.parameter.device


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also where DeepSpeed ZeRO-3 has emptied it."""
    return of_deepspeed.full_shape(parameter)
