"""Modules that look like a feed-forward block by their name but have an unknown layout."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.layers import Layers, lies_beside, role_of_name
from hf_recycle.neurons.linear import is_linear
from hf_recycle.neurons.slices import full_shape

_BESIDE = re.compile("gate|router|norm|drop|act|conv", re.IGNORECASE)


@dataclass(frozen=True)
class LeftOut:
    """A module that is not among the blocks.

    Attributes:
        name: its dotted path.
        made_of: classes of the modules in it that hold matrices.
    """

    name: str
    made_of: str


def left_out(layers: Layers, blocks: Sequence[FeedForward]) -> list[LeftOut]:
    """The outermost modules within layers that are called feed-forward, or experts, and hold no part of a block."""
    modules = {piece.module for block in blocks for piece in block.slices}
    covered = {""}
    for path, module in layers.modules.items():
        while module in modules and path not in covered:
            covered.add(path)
            path = path.rpartition(".")[0]
    return [LeftOut(path, _made_of(layers.modules[path])) for path in _walk(layers, "", covered)]


def alike(entries: Iterable[tuple]) -> Counter[tuple]:
    """How many entries there are of each kind; entries (name, ...) whose names differ in numbers alone are one kind."""
    return Counter((re.sub(r"(?<![^.])\d+(?=\.|$)", "*", name), *rest) for name, *rest in entries)


def summary(others: Sequence[LeftOut], shown: int = 4) -> str:
    """`12 × encoder.layer.*.mlp (Conv1d); ...`, the most frequent first."""
    kinds = alike((other.name, other.made_of) for other in others)
    parts = [f"{count} × {name} ({made_of})" for (name, made_of), count in kinds.most_common(shown)]
    return "; ".join(parts) + ("; ..." if len(kinds) > shown else "")


def token_mixers(layers: Layers) -> list[str]:
    """Classes of the modules within layers that say that they mix tokens, and hold matrices."""
    names = {
        type(module).__name__
        for path, module in layers.modules.items()
        if layers.layer_of(path) not in ("", path) and any(module.children()) and _has_matrices(module)
    }
    return sorted(name for name in names if role_of_name(name) == "mixer")


def _walk(layers: Layers, path: str, covered: set[str]) -> Iterator[str]:
    for child in layers.children(path):
        if layers.is_mixer(child) or lies_beside(child):
            continue
        # A list of bare MLPs is one of heads, not of layers.
        within = layers.layer_of(child) != child if layers else True
        if (
            within
            and (layers.layer_of(child) or not layers)
            and child not in covered
            and _looks_like_one(layers, child)
        ):
            yield child
        else:
            yield from _walk(layers, child, covered)


def _looks_like_one(layers: Layers, path: str) -> bool:
    module, name = layers.modules[path], path.rpartition(".")[2]
    if not layers.is_feed_forward(path) or (_BESIDE.search(name) and not any(map(is_linear, module.children()))):
        return False
    # One matrix of its own is a convolution or what else there is beside a block.
    own = [parameter for parameter in module.parameters(recurse=False) if len(full_shape(parameter)) > 1]
    return len(own) != 1 and _has_matrices(module)


def _has_matrices(module: nn.Module) -> bool:
    return any(len(full_shape(parameter)) > 1 for parameter in module.parameters())


def _made_of(module: nn.Module) -> str:
    classes = {
        type(part).__name__ + (f" in {part.groups} groups" if getattr(part, "groups", 1) != 1 else "")
        for part in module.modules()
        if any(len(full_shape(parameter)) > 1 for parameter in part.parameters(recurse=False))
    }
    known = any(is_linear(part) for part in module.modules())
    return ", ".join(sorted(classes)) + (", of unknown layout" if known else "")
