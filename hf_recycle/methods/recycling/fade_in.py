"""Smooth recycling: x = α·x_new + (1 − α)·stop_grad(x_old) (*Neuron Recycling*, section "Smooth recycling").

Instead of a reparametrised forward pass, the parameter holds the effective x. Before an optimizer step the gradient of
x becomes that of x_new (times α) and x_new takes x's place; after it, x_new is read back and mixed with x_old. That is
the explicit parametrisation exactly, clipping included, when gradients are scaled before their norm is taken.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.fading import FadeIn
from hf_recycle.neurons.storage import Fragments
from hf_recycle.neurons.storage.plain import whole
from hf_recycle.neurons.table import BlockState, NeuronTable


def interpolation(age: Tensor, steps: int) -> Tensor:
    """α after `age` `(n,)` optimizer steps of a fade-in over `steps`: min(1, age / steps), float64 `(n,)`."""
    return (age.to(torch.float64) / steps).clamp(max=1.0)


def mix(new: Tensor, old: Tensor, alpha: Tensor) -> Tensor:
    """α·new + (1 − α)·old for `new`, `old` `(n, width)` or `(n,)` and `alpha` `(n,)`; exactly `new` where α is 1 and
    exactly `old` where α is 0. Computed in float32 at least, returned in the dtype of `new`."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    alpha = alpha.to(device=new.device, dtype=dtype).reshape(-1, *[1] * (new.dim() - 1))
    return (alpha * new.to(dtype)).add_((1 - alpha) * old.to(dtype)).to(new.dtype)


def begin(block: FeedForward, state: BlockState, index: Tensor, values: dict[str, Tensor]) -> None:
    """Starts the fade-in of neurons `index` `(n,)` to `values` `{role: (n, width)}`; the model computes on with the
    old weights."""
    old, new = {}, {}
    for piece in block.slices:
        storage = piece.storage
        old[piece.role] = storage.read_forward(piece, index)
        new[piece.role] = storage.shard(piece, index, values[piece.role])
        if storage.separate_masters:
            storage.write(piece, index, new[piece.role])
    started = FadeIn(index, torch.zeros_like(index), old, new)
    state.fade_in = started if state.fade_in is None else state.fade_in.merged_with(started)


def resume_fade_ins(table: NeuronTable, smooth_steps: int) -> None:
    """Takes fade-ins that were just loaded from a checkpoint into use, once the engine has taken over the model."""
    for block, state in zip(table.blocks, table.states, strict=True):
        if state.fade_in is None or not state.fade_in.whole:
            continue
        fade_in = state.fade_in = state.fade_in.shard(block)
        for piece in block.slices:
            if piece.storage.separate_masters:
                piece.storage.write(piece, fade_in.index, fade_in.new[piece.role])
        _write_blended(block, fade_in, smooth_steps)


@torch.no_grad()
def scale_gradients(table: NeuronTable, smooth_steps: int) -> None:
    """Turns the gradients of x into those of x_new: times α. To be called once, before gradients are clipped. Gradients
    of separate masters are scaled by `hook_gradients`."""
    for block, _, fade_in in _fading_in(table):
        alpha = interpolation(fade_in.age, smooth_steps)
        for piece in block.slices:
            if not piece.storage.separate_masters:
                piece.storage.scale_gradient(piece, fade_in.index, alpha)


def hook_gradients(table: NeuronTable, smooth_steps: int) -> list[torch.utils.hooks.RemovableHandle]:
    """Where masters are separate, scales the gradients of neurons that fade in as they come out of the backward pass,
    before the engine cuts and clips them."""
    handles = []
    for block_index, block in enumerate(table.blocks):
        for parameter in block.parameters():
            pieces = [piece for piece in block.slices if piece.parameter is parameter]
            if pieces[0].storage.separate_masters:
                handles.append(parameter.register_hook(_ScaledGradient(pieces, table, block_index, smooth_steps)))
    return handles


class _ScaledGradient:
    """A hook on a parameter; the gradient it sees is whole on each process."""

    def __init__(self, pieces: list[NeuronSlice], table: NeuronTable, block_index: int, smooth_steps: int):
        self._pieces, self._table, self._block_index, self._smooth_steps = pieces, table, block_index, smooth_steps

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> Tensor | None:
        fade_in = self._table.states[self._block_index].fade_in
        if fade_in is None:
            return None
        gradient = gradient.clone()
        alpha = interpolation(fade_in.age, self._smooth_steps)
        for piece in self._pieces:
            for tile in whole(piece, gradient):
                tile.scale(tile.rows(fade_in.index)[1], alpha)
        return gradient


@torch.no_grad()
def restore_new_weights(table: NeuronTable) -> None:
    """Puts x_new into the parameters. To be called right before the optimizer steps."""
    for block, _, fade_in in _fading_in(table):
        for piece in block.slices:
            if not piece.storage.separate_masters:
                piece.storage.write(piece, fade_in.index, fade_in.new[piece.role])


@torch.no_grad()
def blend_weights(table: NeuronTable, smooth_steps: int, *, advance: bool) -> None:
    """Reads x_new back and gives the model the effective weights. To be called right after the optimizer stepped;
    neurons whose α reaches 1 leave their fade-in with exactly x_new.

    Args:
        advance: False for a skipped step, which α does not count.
    """
    for block, state, fade_in in _fading_in(table):
        for piece in block.slices:
            new = fade_in.new[piece.role]
            fade_in.new[piece.role] = piece.storage.read(piece, fade_in.index, into=new)
        fade_in.age += int(advance)
        alpha = _write_blended(block, fade_in, smooth_steps)
        if (alpha == 1).any():
            state.fade_in = fade_in.only(block, alpha < 1)


def _write_blended(block: FeedForward, fade_in: FadeIn, smooth_steps: int) -> Tensor:
    """Writes the effective weights where the model reads them; returns α `(n,)`."""
    alpha = interpolation(fade_in.age, smooth_steps)
    for piece in block.slices:
        sides = fade_in.new[piece.role], fade_in.old[piece.role], fade_in.held(piece, alpha)
        mixed: Fragments = [mix(*side) for side in zip(*sides, strict=True)]
        piece.storage.write_forward(piece, fade_in.index, mixed)
    return alpha


def _fading_in(table: NeuronTable) -> Iterator[tuple[FeedForward, BlockState, FadeIn]]:
    """The blocks with neurons that fade in. Those of a block that is frozen now wait where they are."""
    for block, state in zip(table.blocks, table.states, strict=True):
        if state.fade_in is not None and not block.is_frozen:
            yield block, state, state.fade_in
