"""How the lines of a `NeuronSlice` are stored, read and written.

The methods never see a parameter: they see lines, one for each neuron, with the neuron as the first dimension,
whatever the parameter's own layout (`nn.Linear`, GPT-2's transposed `Conv1D`, a fused gated matrix). Another way to
store a parameter (a shard of it, say) is another class with these operations.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_recycle.neurons.blocks import NeuronSlice

# Lines of a half-precision parameter that are upcast at a time: bounds the copy that a float32 norm of them needs.
_LINES_UPCAST_AT_ONCE = 1024


class PlainStorage:
    """Parameters that are ordinary tensors, whole on this process: one process, or DDP."""

    def lines(self, piece: "NeuronSlice", tensor: Tensor | None = None) -> Tensor:
        """A view `(d_ff, width)` (a bias: `(d_ff,)`) of the parameter, or of a tensor laid out like it."""
        tensor = piece.parameter if tensor is None else tensor
        return tensor.detach().movedim(piece.dim, 0).narrow(0, piece.offset, piece.length)

    def norms(self, piece: "NeuronSlice", dtype: torch.dtype) -> Tensor:
        """L2 norm of every line, computed in `dtype`: `(d_ff,)`."""
        lines = self.lines(piece)
        # vector_norm upcasts the whole of its argument first; in chunks, that copy stays small.
        chunks = [lines] if lines.dtype == dtype else lines.split(_LINES_UPCAST_AT_ONCE)
        return torch.cat([torch.linalg.vector_norm(chunk, dim=1, dtype=dtype) for chunk in chunks])

    def mean_std(self, piece: "NeuronSlice") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over all the lines, as scalars in float32 (float64 for float64 weights)."""
        lines = self.lines(piece)
        std, mean = torch.std_mean(lines.to(torch.promote_types(lines.dtype, torch.float32)))
        return mean, std

    def read(self, piece: "NeuronSlice", index: Tensor) -> Tensor:
        """A copy of lines `index` `(n,)`: `(n, width)`."""
        lines = self.lines(piece)
        return lines.index_select(0, index.to(lines.device))

    def write(self, piece: "NeuronSlice", index: Tensor, values: Tensor) -> None:
        """Overwrites lines `index` `(n,)` with `values` `(n, width)`, cast to the parameter's dtype."""
        lines = self.lines(piece)
        lines.index_copy_(0, index.to(lines.device), values.to(lines))

    def scale(self, piece: "NeuronSlice", factors: Tensor) -> None:
        """Multiplies every line by its factor, `factors` `(d_ff,)`, in place."""
        lines = self.lines(piece)
        lines.mul_(_as_column(factors, lines))

    def scale_gradient(self, piece: "NeuronSlice", index: Tensor, factors: Tensor) -> None:
        """Multiplies the gradient of lines `index` `(n,)`, if there is one, by `factors` `(n,)`, in place."""
        if piece.parameter.grad is None:
            return
        lines = self.lines(piece, piece.parameter.grad)
        index = index.to(lines.device)
        picked = lines.index_select(0, index)
        lines.index_copy_(0, index, picked.mul_(_as_column(factors, picked)))


def _as_column(factors: Tensor, lines: Tensor) -> Tensor:
    return factors.to(lines).reshape(-1, *[1] * (lines.dim() - 1))


_PLAIN = PlainStorage()


def storage_of(parameter: Tensor) -> PlainStorage:
    """The storage of a parameter.

    Raises:
        NotImplementedError: for a parameter that is sharded over processes.
    """
    if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
        raise NotImplementedError(
            f"This parameter is sharded ({type(parameter).__name__}); hf_recycle works on parameters that each process "
            "holds whole (one process, or DDP): launch without FSDP, tensor parallelism or DeepSpeed."
        )
    return _PLAIN
