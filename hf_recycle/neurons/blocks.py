"""A feed-forward block and the slices of parameters that make up its neurons."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_recycle.neurons.slices import ParameterSlice, full_shape
from hf_recycle.neurons.storage import Storage, storage_of


class NeuronSlice(ParameterSlice):
    """A slice that knows how its parameter is stored now."""

    @property
    def storage(self) -> Storage:
        return storage_of(self.parameter)

    def lines(self) -> Tensor:
        """The numbers of all its lines, int64 `(length,)` on the CPU."""
        return torch.arange(self.length)


def whole_slices(model: nn.Module, names: Iterable[str]) -> dict[str, NeuronSlice]:
    """All of some parameters of a model, of any shape: the lines are counted along the first dimension."""
    slices = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        length = next(iter(full_shape(getattr(module, attribute))), 1)
        slices[name] = NeuronSlice("", module, attribute, dim=0, offset=0, length=length)
    return slices


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block.

    Attributes:
        name: dotted path, in the unwrapped model, of the smallest module that holds both projections (its holder);
            for an expert whose weights lie in parameters of all experts, that and the expert's number; for the second
            block of one holder, the path of its in-projection.
        num_neurons: `d_ff`.
        gated: whether a neuron has a gate row and an up row.
        slices: what a neuron is made of, in-projection first, out-projection last.
        holder: path of the smallest module that holds both projections.
    """

    name: str
    num_neurons: int
    gated: bool
    slices: tuple[NeuronSlice, ...]
    holder: str

    @cached_property
    def in_slices(self) -> tuple[NeuronSlice, ...]:
        """The rows of the in-projection, without biases: one slice, or two for a gated block."""
        return tuple(piece for piece in self.slices if not piece.is_bias and piece.role != "out")

    @cached_property
    def out_slice(self) -> NeuronSlice:
        """The columns of the out-projection."""
        return self.slices[-1]

    @property
    def out_bias(self) -> NeuronSlice | None:
        """The out-projection's bias, which belongs to no neuron, as a slice of `d_model` lines; None without one."""
        module, expert = self.out_slice.module, self.out_slice.expert
        if expert is not None or getattr(module, "bias", None) is None:
            return None
        return NeuronSlice("out.bias", module, "bias", dim=0, offset=0, length=self.out_slice.width)

    @cached_property
    def weight_slices(self) -> tuple[NeuronSlice, ...]:
        """All but the biases."""
        return (*self.in_slices, self.out_slice)

    @property
    def is_frozen(self) -> bool:
        """Whether any of its weights requires no gradient now."""
        return not all(piece.parameter.requires_grad for piece in self.weight_slices)

    def __getitem__(self, role: str) -> NeuronSlice:
        return next(piece for piece in self.slices if piece.role == role)

    def norms(self) -> tuple[Tensor, Tensor]:
        """L2 norms of the neurons' in-rows (over both rows when gated) and out-columns, each `(d_ff,)`.

        Computed in float32, or in the parameter's dtype if that is wider.
        """
        return norms_of([self])[0]

    def magnitudes(self) -> Tensor:
        """Magnitude of every neuron, `‖W_in[i]‖₂ · ‖W_out[:, i]‖₂`, float32 `(d_ff,)`; biases left out.

        Source: *Neuron Recycling*, section "Magnitude".
        """
        return magnitudes_of([self])[0]

    def out_columns(self) -> Tensor:
        """A copy of the out-projection, a row for each neuron: `(d_ff, d_model)`."""
        return self.out_slice.storage.read_full(self.out_slice, torch.arange(self.num_neurons))

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Copies of the weights of neurons `index` `(n,)`: `{role: (n, width)}`, biases `(n,)`."""
        return {piece.role: piece.storage.read_full(piece, index) for piece in self.slices}

    def write(self, index: Tensor, values: dict[str, Tensor]) -> None:
        """Overwrites the weights of neurons `index` `(n,)` in place; `values` as `read` returns them."""
        for piece in self.slices:
            piece.storage.write_full(piece, index, values[piece.role])

    def zero_(self, index: Tensor) -> None:
        """Sets the weights of neurons `index` `(n,)` to zero in place, biases too."""
        for piece in self.slices:
            piece.storage.clear(piece, index)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters the block's neurons lie in, each once."""
        return iter({id(piece.parameter): piece.parameter for piece in self.slices}.values())


def norms_of(blocks: Sequence[FeedForward]) -> list[tuple[Tensor, Tensor]]:
    """`FeedForward.norms` of some blocks, with one sum over processes for all that are sharded alike."""
    alike: dict[tuple, list[NeuronSlice]] = {}
    for block in blocks:
        dtype = torch.promote_types(block.out_slice.dtype, torch.float32)
        for piece in block.weight_slices:
            parameter = piece.parameter
            storage = storage_of(parameter)
            key = storage, dtype, storage.processes(piece), piece.length, parameter.device
            alike.setdefault(key, []).append(piece)
    norms: dict[NeuronSlice, Tensor] = {}
    for (storage, dtype, *_), pieces in alike.items():
        norms |= zip(pieces, storage.norms(pieces, dtype), strict=True)
    found = []
    for block in blocks:
        parts = [norms[piece] for piece in block.in_slices]
        in_norm = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
        found.append((in_norm, norms[block.out_slice]))
    return found


def magnitudes_of(blocks: Sequence[FeedForward]) -> list[Tensor]:
    """`FeedForward.magnitudes` of some blocks, see `norms_of`."""
    return [(in_norm * out_norm).to(torch.float32) for in_norm, out_norm in norms_of(blocks)]
