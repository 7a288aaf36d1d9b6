"""The last layer's feed-forward block, computed at the masked positions only.

Behind the last attention nothing mixes positions any more, so where the head looks at the masked positions alone, the
last feed-forward block need not compute the others: the loss and the gradients are the same. Its inputs are gathered
before the in-projection; its outputs are put back in their places, zeros elsewhere, behind the out-projection. So
dropout, residual and norm see the shapes they always see, and dropout draws the same numbers.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_recycle.internals.of_torch import all_hooks, is_in_backward
from hf_recycle.mlm.plain_loss import comes_with_a_library, is_hook_of_a_library
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.utils.hooks import PassingHook


class LastFeedForward:
    """Restricts the block that is made of the linear layers `ins` and `out` in `layer` of `model` to chosen positions;
    not while the model has hooks of the user, who would find them there."""

    def __init__(self, model: nn.Module, layer: nn.Module, ins: list[nn.Module], out: nn.Module) -> None:
        self._model, self._places = weakref.ref(model), _Places()  # it keeps no model alive
        self.hooks = [
            PassingHook(layer, _Begin(self._places)),
            *(PassingHook(module, _Gather(self._places)) for module in ins),
            PassingHook(out, _Scatter(self._places), behind=True),
        ]

    def set(self, positions: Tensor | None, padding: Tensor | None) -> None:
        """As in `MaskedHead.at`; without positions, the block is as it was."""
        model = self._model()
        if positions is not None and model is not None and _is_watched(model):
            positions = padding = None
        self._places.positions, self._places.padding = positions, padding


class _Places:
    """What the hooks of one block share. They know nothing of the model, and those of a copied or pickled one idle.

    Attributes:
        positions, padding: what `set` asks for.
        now: positions and padding of the forward pass that is under way, or went before: what gradient checkpointing
            computes once more within the backward pass.
        shape: `(batch, sequence)` between the two projections.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.padding: Tensor | None = None
        self.now: tuple[Tensor | None, Tensor | None] = (None, None)
        self.shape: torch.Size | None = None

    def __reduce__(self) -> tuple:
        return type(self), ()

    @property
    def idle(self) -> bool:
        """Whether the block must be computed at all positions, whoever calls it."""
        return self.now[0] is None or (self.positions is None and not _in_backward())


def _is_watched(model: nn.Module) -> bool:
    """Whether the model has hooks that look at the block's positions: of none of the libraries that train it, or ours
    that say so."""
    hooks = all_hooks(model.modules())
    return any(getattr(hook, "sees_all_positions", False) or not is_hook_of_a_library(hook) for hook in hooks)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and is_in_backward()


class _Hook:
    def __init__(self, places: _Places) -> None:
        self.places = places


class _Begin(_Hook):
    """Forward pre-hook of the layer. (To `torch.compile`, what it first meets as an attribute of a layer of torch, such
    as a linear one, has a static shape; so it meets `places` here.)"""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not _in_backward():
            self.places.now = self.places.positions, self.places.padding


class _Gather(_Hook):
    """Forward pre-hook of an in-projection."""

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.places.idle:
            return None
        (hidden,), (positions, _) = args, self.places.now
        self.places.shape = hidden.shape[:-1]
        return (hidden.flatten(0, -2).index_select(0, positions),)


class _Scatter(_Hook):
    """Forward hook of the out-projection."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        (positions, padding), shape = self.places.now, self.places.shape
        if self.places.idle or positions is None or shape is None:
            return None
        self.places.shape = None
        if padding is not None:  # it points to a position that may be among the others: it must add nothing there
            output = output.masked_fill(padding[:, None], 0)
        full = output.new_zeros(shape.numel(), output.shape[-1]).index_add(0, positions, output)
        return full.view(*shape, -1)


def find_last_feed_forward(model: nn.Module) -> LastFeedForward | None:
    """The last block of an encoder whose head works position by position; None where it is not known that the block is
    computed once in a forward pass, last and over the whole sequence: blocks that are not found or that layers share,
    layers in groups (ALBERT), a module of the user's around the block, or blocks computed in chunks of the sequence."""
    config: Any = model.config
    try:
        blocks = find_feed_forwards(model)
    except ValueError:
        return None
    path = blocks[-1].name.split(".")
    place = next((place for place, name in enumerate(path) if name.isdecimal()), None)
    chunked = getattr(config, "chunk_size_feed_forward", 0)
    if place is None or chunked:
        return None
    *above, holder = [model.get_submodule(".".join(path[:depth])) for depth in range(place + 1)]
    if not isinstance(holder, nn.ModuleList):
        return None
    layers = list(holder)
    last = layers[int(path[place])]
    once_each = len(blocks) == len({*layers}) == config.num_hidden_layers and last is layers[-1]
    if not once_each or not all(map(comes_with_a_library, [*above, *last.modules()])):
        return None
    *ins, out = dict.fromkeys(part.module for part in blocks[-1].slices)
    return LastFeedForward(model, last, ins, out)
