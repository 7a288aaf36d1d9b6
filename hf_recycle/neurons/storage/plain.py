"""Parameters that are ordinary tensors, whole on each process: one process, or DDP."""

import torch
from torch import Tensor

from hf_recycle.neurons.slices import ParameterSlice
from hf_recycle.neurons.storage.base import Storage
from hf_recycle.neurons.storage.tiles import MANY, Tile, to_device


class PlainStorage(Storage):
    """One tile, which is all there is."""

    sharded = False

    def tiles(self, piece: ParameterSlice) -> list[Tile]:
        return whole(piece, piece.parameter)

    def gradient_tiles(self, piece: ParameterSlice) -> list[Tile]:
        gradient = piece.parameter.grad
        return [] if gradient is None else whole(piece, gradient)

    def optimizer_state(self, optimizer, piece: ParameterSlice) -> dict[str, list[Tile] | Tensor]:
        state = optimizer.state.get(piece.parameter, {})
        alike = piece.parameter.shape
        return {
            key: whole(piece, value) if type(value) is Tensor and value.shape == alike else value
            for key, value in state.items()
        }

    def write_full(self, piece: ParameterSlice, index: Tensor, lines: Tensor) -> None:
        # As the general way does, in fewer operations: a phase does this for every slice.
        memory = _part(piece, piece.parameter)
        index, lines = to_device(index, memory.device), to_device(lines.to(memory.dtype), memory.device)
        if piece.dim:
            _write_columns(memory, index, lines.T.contiguous())
        elif _is_for_numpy(memory, index, memory.shape[0]):
            memory.numpy()[index.numpy()] = lines.numpy()
        else:
            memory.index_copy_(0, index, lines)

    def sum_over_processes(self, piece: ParameterSlice, values: Tensor) -> Tensor:
        return values


def _write_columns(memory: Tensor, index: Tensor, columns: Tensor) -> None:
    if _is_for_numpy(memory, index, memory.shape[1]) and torch.get_num_threads() == 1:
        starts = torch.arange(0, memory.numel(), memory.shape[1]).unsqueeze(1)
        memory.view(-1).numpy()[(starts + index).numpy()] = columns.numpy()
    else:
        memory.scatter_(1, index.expand(memory.shape[0], -1), columns)


def _is_for_numpy(memory: Tensor, index: Tensor, count: int) -> bool:
    """Whether lines `index` `(n,)` of `count` are few, which NumPy writes faster: what takes time are the caches that
    miss, and its loops get through them on one thread."""
    return index.shape[0] * MANY < count and memory.is_cpu and memory.is_contiguous() and memory.element_size() >= 4


def whole(piece: ParameterSlice, tensor: torch.Tensor) -> list[Tile]:
    """The one tile of a tensor laid out like the slice's parameter."""
    part = _part(piece, tensor)
    if part.dim() == 1:
        part = part.unsqueeze(1)
    return [Tile(part.T if piece.dim else part, 0, 0, has_all_neurons=True)]


def _part(piece: ParameterSlice, tensor: torch.Tensor) -> torch.Tensor:
    """What belongs to the slice, of a tensor laid out like its parameter; a view."""
    tensor = tensor.detach()
    if piece.expert is not None:
        tensor = tensor[piece.expert]
    elif tensor.dim() != 2:
        tensor = tensor.view(len(tensor), -1) if tensor.dim() > 2 else tensor.view(-1)
    if tensor.shape[piece.dim] == piece.length:
        return tensor
    if piece.stride == 1:
        return tensor.narrow(piece.dim, piece.offset, piece.length)
    lines = slice(piece.offset, piece.offset + piece.stride * piece.length, piece.stride)
    return tensor[:, lines] if piece.dim else tensor[lines]
