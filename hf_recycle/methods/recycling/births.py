"""New weights for recycled neurons. To add a reinitialization, write a function here and decorate it; see CONTRIBUTING.

A reinitialization looks at a block through `Block` and returns a `Birth`; it writes nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hf_recycle.methods.recycling.selection import others
from hf_recycle.methods.registry import REINITIALIZATIONS, needs


class Block(Protocol):
    """What a reinitialization may know of a block. Values are `{role: (n, width)}`, biases `(n,)`."""

    num_neurons: int
    is_dictionary: bool
    """Whether the model is this block and vectors: a sparse autoencoder, whose out-columns are what it learns."""
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

    def norms(self) -> tuple[Tensor, Tensor]:
        """L2 norms of the in-rows (over both rows when gated) and the out-columns of all neurons, each `(d_ff,)`."""


@dataclass(frozen=True)
class Options:
    """Knobs of the reinitializations.

    Attributes:
        noise_scale: for `copy_noise` and `split`: standard deviation of the noise over that of the matrix.
        others: indices of the neurons that are neither reborn now, nor pruned or fading in; None: all but the reborn.
        statistics: what the reinitialization says by `needs` that it looks at, see `registry.STATISTICS`.
    """

    noise_scale: float = 0.05
    others: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Birth:
    """The new weights of reborn neurons, and changes that go with them.

    The optimizer state of the reborn becomes what `recycle_optimizer_state` says; that of others stays.

    Attributes:
        values: of the reborn, in their order: `{role: (n, width)}`, biases `(n,)`.
        edited: indices of other neurons whose weights change, int64 `(m,)`, all different.
        edits: their new weights, as `values`.
    """

    values: dict[str, Tensor]
    edited: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    edits: dict[str, Tensor] = field(default_factory=dict)

    def together(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reborn `index` `(n,)` and the edited in one: `(n + m,)` and their weights."""
        if not len(self.edited):
            return index, self.values
        sides = {role: (values, self.edits[role].to(values)) for role, values in self.values.items()}
        return torch.cat([index, self.edited]), {role: torch.cat(pair) for role, pair in sides.items()}


@REINITIALIZATIONS.register
def initial(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """from the distribution the model was initialised from (article, "Baseline recycling")"""
    return Birth(block.sample_initial(len(index), generator))


@REINITIALIZATIONS.register
def matched_normal(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """N(mean, std) of all current weights of each matrix (article, "Modifying reinitialization distribution")"""
    values = block.sample_initial(len(index), generator, block.bias_roles)
    for role in block.weight_roles:
        mean, std = (value.float() for value in block.mean_std(role))
        noise = torch.randn(len(index), block.width(role), generator=generator)
        values[role] = mean + std * noise.to(std.device)
    return Birth(values)


@REINITIALIZATIONS.register
def copy_noise(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """a copy of a neuron that is not being recycled, plus noise (article, "Copying existing neurons")"""
    pool = others(block.num_neurons, index)
    pool = pool if len(pool) else torch.arange(block.num_neurons)
    sources = pool[torch.randint(len(pool), (len(index),), generator=generator)]
    values = block.read(sources)
    for role in block.weight_roles:
        std = block.mean_std(role)[1].float()
        noise = torch.randn(values[role].shape, generator=generator)
        values[role] = values[role] + options.noise_scale * std * noise.to(std.device)
    return Birth(values)


@REINITIALIZATIONS.register
def zero_out(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """initial in-rows, as long as the others' on average; out-columns zero, so that they add nothing at first"""
    return Birth(_scaled_to_others(block, _without_outputs(block, len(index), generator), index, options))


@REINITIALIZATIONS.register
def split(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """copies of the largest neurons, which share out-columns with them, unevenly and with the same sum (Net2Net)"""
    pool = _pool(block, index, options)
    in_norm, out_norm = block.norms()
    order = (in_norm * out_norm).cpu()[pool].argsort(descending=True, stable=True)
    if len(pool) < len(index):
        raise ValueError(
            f"recycle_reinit='split' has {len(pool)} neurons to share with {len(index)} newborns: lower "
            "recycle_fraction."
        )
    sources = pool[order[: len(index)]]
    values, edits = block.read(sources), block.read(sources)
    share = torch.rand(len(index), 1, generator=generator).to(values["out"].device)
    noise = torch.randn(values["out"].shape, generator=generator).to(share.device)
    noise = options.noise_scale * block.mean_std("out")[1].float() * noise
    whole = values["out"].float()
    values["out"] = (share * whole + noise).to(whole)
    edits["out"] = whole - values["out"]
    return Birth(values, sources, edits)


@REINITIALIZATIONS.register
@needs("descent")
def gradmax(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """in-rows whose out-columns, zero now, get the largest gradient (Evci et al. 2022, "GradMax")"""
    values = _without_outputs(block, len(index), generator)
    # In a gated block what the gate lets through is multiplied: its row stays an initial one.
    role = next(role for role in block.weight_roles if role != "gate")
    directions = torch.linalg.svd(options.statistics["descent"].cpu().double()).Vh[: len(index)]
    # Which of the two signs an SVD gives differs by machine: the largest entry decides.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    values[role][: len(directions)] = (directions * largest.sign()).to(values[role])
    return Birth(_scaled_to_others(block, values, index, options))


@REINITIALIZATIONS.register
@needs("token_inputs")
def sample(block: Block, index: Tensor, generator: torch.Generator, options: Options) -> Birth:
    """in-rows along inputs of tokens drawn by their loss, a fifth as long as the others'; out-columns zero

    In a sparse autoencoder the out-columns are the same directions (Bricken et al. 2023, "Towards monosemanticity").
    """
    values = _without_outputs(block, len(index), generator)
    inputs = options.statistics["token_inputs"][: len(index)].cpu().float()
    directions = torch.nn.functional.normalize(inputs, dim=1)
    for role in values:
        if role in block.bias_roles:
            values[role][: len(directions)] = 0  # so that each is on at its token
        elif role != "out" or block.is_dictionary:
            values[role][: len(directions)] = directions
    return Birth(_scaled_to_others(block, values, index, options, share=0.2))


def _pool(block: Block, index: Tensor, options: Options) -> Tensor:
    return others(block.num_neurons, index) if options.others is None else options.others


def _without_outputs(block: Block, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`n` neurons from the initial distribution, but for their out-columns, which are zero."""
    roles = [role for role in (*block.weight_roles, *block.bias_roles) if role != "out"]
    return block.sample_initial(n, generator, roles) | {"out": torch.zeros(n, block.width("out"))}


def _scaled_to_others(
    block: Block, values: dict[str, Tensor], index: Tensor, options: Options, share: float = 1.0
) -> dict[str, Tensor]:
    """`values` with in-rows `share` times as long as those of the other neurons on average, where there are others."""
    pool = _pool(block, index, options)
    if not len(pool):
        return values
    length = share * block.norms()[0].cpu().double()[pool].mean()
    roles = [role for role in block.weight_roles if role != "out"]
    norms = torch.cat([values[role].double() for role in roles], dim=1).norm(dim=1, keepdim=True)
    factor = torch.where(norms > 0, length / norms, 0.0)
    return values | {role: (values[role] * factor).to(values[role].dtype) for role in roles}
