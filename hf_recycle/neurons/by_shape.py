"""Blocks of models of unknown layout, found by the shapes of their linear layers."""

import itertools
from collections.abc import Collection, Iterator

from torch import nn

from hf_recycle.neurons.families import Layout
from hf_recycle.neurons.layers import Layers, lies_beside
from hf_recycle.neurons.linear import in_features, is_linear, out_features


def match_by_shape(layers: Layers, found: Collection[str]) -> Iterator[tuple[Layout, str]]:
    """Layouts, with the path they are relative to: the smallest modules in which just one narrowing layer f -> d
    (f > d) is mirrored by widening layers d -> f before it, by one or two of them.

    The order keeps out adapters, which narrow first. Attention, whose heads may be wider than the model, is kept out by
    its name, and so is what does not lie in a layer, where the model has layers. Where a layer normalises vectors of f
    entries and none of d, the model is f wide: the pair is the end of one block and the beginning of another.

    Args:
        found: layers that have a block already.
    """
    linears = _linears_by_layer(layers)
    taken: set[str] = set()
    deepest_first = sorted(layers.modules, key=lambda path: -len(path.split(".")) if path else 0)
    for path in deepest_first:
        layer = layers.layer_of(path)
        if layer in found or (layers and not layer):
            continue
        inside = [name for name in linears.get(layer, ()) if not path or name.startswith(f"{path}.")]
        mirrored = {
            out: wide
            for position, out in enumerate(inside)
            if _narrows(layers.modules[out])
            and (wide := [name for name in inside[:position] if mirrors(layers.modules[name], layers.modules[out])])
        }
        if len(mirrored) != 1:
            continue
        out, wide = mirrored.popitem()
        if len(wide) > 2 or out in taken or _is_turned_around(layers, layer, layers.modules[out]):
            continue
        taken.add(out)
        start = len(path) + 1 if path else 0
        yield Layout(tuple(name[start:] for name in wide), out[start:]), path


def candidates(layers: Layers) -> list[str]:
    """What a user could name as a block: pairs of linear layers, one behind the other in a layer, whose shapes mirror
    each other, or where the first makes two halves of a gated block."""
    found = []
    for layer, names in _linears_by_layer(layers).items():
        for first, second in itertools.pairwise(names):
            a, b = layers.modules[first], layers.modules[second]
            if not layers.within_one((first, second)) or _is_turned_around(layers, layer, b):
                continue
            shape = f"({in_features(a)} -> {out_features(a)} -> {out_features(b)})"
            if mirrors(a, b):
                found.append(f"{first} -> {second} {shape}")
            elif in_features(a) == out_features(b) and out_features(a) == 2 * in_features(b):
                found.append(f"fused:{first} -> {second} {shape}")
    return found


def mirrors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two linear layers are d -> f and f -> d."""
    return in_features(first) == out_features(second) and out_features(first) == in_features(second)


def _linears_by_layer(layers: Layers) -> dict[str, list[str]]:
    """Paths of the linear layers that mix no tokens, by the layer that they lie in."""
    linears: dict[str, list[str]] = {}
    for path, module in layers.modules.items():
        # Of convolutions only registered layouts know which are feed-forward: in image models they are everywhere.
        if (
            path
            and is_linear(module)
            and not isinstance(module, nn.Conv1d | nn.Conv2d)
            and not layers.mixes_tokens(path)
            and not lies_beside(path)
        ):
            linears.setdefault(layers.layer_of(path), []).append(path)
    return linears


def _narrows(linear: nn.Module) -> bool:
    return out_features(linear) < in_features(linear)


def _is_turned_around(layers: Layers, layer: str, out: nn.Module) -> bool:
    prefix = f"{layer}." if layer else ""
    normalised = {
        module.weight.numel()
        for path, module in layers.modules.items()
        if path.startswith(prefix) and "norm" in type(module).__name__.lower() and _has_vector(module)
    }
    return in_features(out) in normalised and out_features(out) not in normalised


def _has_vector(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1
