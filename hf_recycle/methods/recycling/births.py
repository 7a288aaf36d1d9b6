"""New weights for recycled neurons. To add a reinitialization, write a function here and decorate it; see CONTRIBUTING.

A reinitialization looks at a block through `Block` and returns values; it writes nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_recycle.methods.registry import REINITIALIZATIONS


class Block(Protocol):
    """What a reinitialization may know of a block. Values are `{role: (n, width)}`, biases `(n,)`."""

    num_neurons: int
    weight_roles: Sequence[str]

    bias_roles: Sequence[str]

    def sample_initial(
        self, n: int, generator: torch.Generator, roles: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """`n` neurons drawn from the distribution the model was initialised from; only some roles of them if given."""

    def width(self, role: str) -> int:
        """Weights of a neuron in one matrix."""

    def mean_std(self, role: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all the current weights of one matrix."""

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """The current weights of neurons `index` `(n,)`."""


@dataclass(frozen=True)
class Options:
    """Knobs of the reinitializations.

    Attributes:
        noise_scale: for `copy_noise`: standard deviation of the noise over that of the matrix.
    """

    noise_scale: float = 0.05


@REINITIALIZATIONS.register
def initial(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> dict[str, Tensor]:
    """from the distribution the model was initialised from (article, "Baseline recycling")"""
    return block.sample_initial(len(index), generator)


@REINITIALIZATIONS.register
def matched_normal(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> dict[str, Tensor]:
    """N(mean, std) of all current weights of each matrix (article, "Modifying reinitialization distribution")"""
    values = block.sample_initial(len(index), generator, block.bias_roles)
    for role in block.weight_roles:
        mean, std = (value.float() for value in block.mean_std(role))
        noise = torch.randn(len(index), block.width(role), generator=generator)
        values[role] = mean + std * noise.to(std.device)
    return values


@REINITIALIZATIONS.register
def copy_noise(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> dict[str, Tensor]:
    """a copy of a neuron that is not being recycled, plus noise (article, "Copying existing neurons")"""
    others = torch.ones(block.num_neurons, dtype=torch.bool)
    others[index] = False
    pool = others.nonzero().flatten() if others.any() else torch.arange(block.num_neurons)
    sources = pool[torch.randint(len(pool), (len(index),), generator=generator)]
    values = block.read(sources)
    for role in block.weight_roles:
        std = block.mean_std(role)[1].float()
        noise = torch.randn(values[role].shape, generator=generator)
        values[role] = values[role] + options.noise_scale * std * noise.to(std.device)
    return values
