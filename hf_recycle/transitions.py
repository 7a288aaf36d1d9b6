"""Carries the neurons in transition through one optimizer step (see `hf_recycle.methods.smooth`).

Between steps the parameters hold the effective weights x; only while the optimizer steps do they hold x_new.
"""

import torch

from hf_recycle.methods.smooth import interpolation, mix
from hf_recycle.neurons.table import NeuronTable


@torch.no_grad()
def scale_gradients(table: NeuronTable, smooth_steps: int) -> None:
    """Turns the gradients of x into those of x_new: times α. To be called once, before gradients are clipped."""
    for block, state in zip(table.blocks, table.states, strict=True):
        if state.transition is not None:
            alpha = interpolation(state.transition.age, smooth_steps)
            for piece in block.slices:
                piece.storage.scale_gradient(piece, state.transition.index, alpha)


@torch.no_grad()
def show_new_weights(table: NeuronTable) -> None:
    """Puts x_new into the parameters. To be called right before the optimizer steps."""
    for block, state in zip(table.blocks, table.states, strict=True):
        if state.transition is not None:
            block.write(state.transition.index, state.transition.new)


@torch.no_grad()
def show_effective_weights(table: NeuronTable, smooth_steps: int, *, advance: bool) -> None:
    """Reads x_new back and puts the effective weights into the parameters. To be called right after the optimizer
    stepped; neurons whose α reaches 1 leave their transition with exactly x_new.

    Args:
        advance: False for a skipped step, which α does not count.
    """
    for block, state in zip(table.blocks, table.states, strict=True):
        transition = state.transition
        if transition is None:
            continue
        transition.new = block.read(transition.index)
        transition.age += int(advance)
        alpha = interpolation(transition.age, smooth_steps)
        mixed = {role: mix(new, transition.old[role], alpha) for role, new in transition.new.items()}
        block.write(transition.index, mixed)
        going_on = alpha < 1
        if not going_on.all():
            state.transition = transition.only(going_on) if going_on.any() else None
