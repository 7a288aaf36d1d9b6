"""Finds the feed-forward blocks of a model."""

import itertools
import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice, full_shape
from hf_recycle.neurons.families import FAMILIES, Layout, known_layouts, parse_layout

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def find_feed_forwards(model: nn.Module, pattern: str | None = None) -> list[FeedForward]:
    """The feed-forward blocks of `model`, in the model's own order; a block shared by several layers appears once.

    Args:
        model: the unwrapped model.
        pattern: a layout that overrides the search, such as `"fc1 -> fc2"`, `"gate + up -> down"` or
            `"fused:Wi -> Wo"`, with the paths of the linear layers relative to a module that holds them.

    Raises:
        ValueError: if no block is found; the message lists the pairs of linear layers that could be one.
    """
    if pattern is not None:
        blocks = _match(model, (parse_layout(pattern),))
        if not blocks:
            raise ValueError(f"ff_pattern={pattern!r} matches nothing in {_describe(model)}. {_candidates(model)}")
        return blocks
    model_types = {getattr(getattr(m, "config", None), "model_type", None) for m in model.modules()}
    own = tuple(layout for model_type in model_types if model_type in FAMILIES for layout in FAMILIES[model_type])
    blocks = _match(model, own) or _match(model, known_layouts()) or _match_by_shape(model)
    if not blocks:
        raise ValueError(f"No feed-forward block was found in {_describe(model)}. {_candidates(model)}")
    return blocks


def _match(model: nn.Module, layouts: tuple[Layout, ...]) -> list[FeedForward]:
    blocks, seen = [], set()
    for path, holder in model.named_modules():
        for layout in layouts:
            block = _build(model, path, holder, layout)
            if block is not None and id(block.out_slice.parameter) not in seen:
                seen.add(id(block.out_slice.parameter))
                blocks.append(block)
    return blocks


def _build(model: nn.Module, path: str, holder: nn.Module, layout: Layout) -> FeedForward | None:
    """The block that `layout` describes under `holder`, or None if its layers are missing or do not fit together."""
    linears = [_submodule(holder, relative) for relative in (*layout.ins, layout.out)]
    if not all(_is_linear(linear) for linear in linears):
        return None
    *ins, out = linears
    d_ff, d_model = _in_features(out), _out_features(out)
    rows = (2 if layout.fused else 1) * d_ff
    if any(_in_features(linear) != d_model or _out_features(linear) != rows for linear in ins):
        return None
    roles = ("gate", "up") if layout.gated else ("in",)
    parts = [(ins[0], i * d_ff) for i in range(2)] if layout.fused else [(linear, 0) for linear in ins]
    slices = []
    for role, (linear, offset) in zip(roles, parts, strict=True):
        slices.append(NeuronSlice(role, linear, "weight", _out_dim(linear), offset, d_ff))
        if linear.bias is not None:
            slices.append(NeuronSlice(f"{role}.bias", linear, "bias", 0, offset, d_ff))
    slices.append(NeuronSlice("out", out, "weight", 1 - _out_dim(out), 0, d_ff))
    prefix = f"{path}." if path else ""
    name = _common_parent([prefix + relative for relative in (*layout.ins, layout.out)])
    return FeedForward(name, d_ff, layout.gated, tuple(slices))


def _match_by_shape(model: nn.Module) -> list[FeedForward]:
    """Blocks of an unknown architecture: the smallest modules in which just one narrowing layer f -> d (f > d) is
    mirrored by widening layers d -> f before it, and by one or two of them.

    The order keeps out adapters, which narrow first; attention, whose heads may be wider than the model, is kept out by
    its name."""
    blocks, taken = [], set()
    deepest_first = sorted(model.named_modules(), key=lambda item: -len(item[0].split(".")) if item[0] else 0)
    for path, holder in deepest_first:
        linears = [
            (name, module)
            for name, module in holder.named_modules()
            if name and _is_linear(module) and not _ATTENTION.search(f"{path}.{name}")
        ]
        mirrored = {
            out: wide
            for position, (out, narrow) in enumerate(linears)
            if _out_features(narrow) < _in_features(narrow)
            and (wide := [name for name, module in linears[:position] if _mirrors(module, narrow)])
        }
        if len(mirrored) != 1:
            continue
        out, wide = mirrored.popitem()
        block = _build(model, path, holder, Layout(tuple(wide), out)) if len(wide) <= 2 else None
        if block is not None and id(block.out_slice.parameter) not in taken:
            taken.add(id(block.out_slice.parameter))
            blocks.append(block)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return sorted(blocks, key=lambda block: order[block.name])


def _candidates(model: nn.Module) -> str:
    """What a user could name as a block: pairs of linear layers under one parent whose shapes mirror each other."""
    linears = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    pairs = [
        f"{first} -> {second} ({_in_features(a)} -> {_out_features(a)} -> {_out_features(b)})"
        for (first, a), (second, b) in itertools.pairwise(linears)
        if _mirrors(a, b)
    ]
    if not pairs:
        return "It holds no pair of linear layers d -> f, f -> d that could be one."
    shown = "; ".join(pairs[:6]) + ("; ..." if len(pairs) > 6 else "")
    return f"Name its layers with ff_pattern='in -> out'; pairs of linear layers that could be a block: {shown}."


def _describe(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")


def _submodule(holder: nn.Module, relative: str) -> nn.Module | None:
    try:
        return holder.get_submodule(relative)
    except AttributeError:
        return None


def _is_linear(module: nn.Module | None) -> bool:
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    # A quantised layer's integer weights are no place to write a fresh neuron to, and a baseline without feed-forward
    # neurons has layers without weights.
    return module.weight.is_floating_point() and all(full_shape(module.weight))


def _mirrors(first: nn.Module, second: nn.Module) -> bool:
    return _in_features(first) == _out_features(second) and _out_features(first) == _in_features(second)


def _out_dim(linear: nn.Module) -> int:
    return 1 if isinstance(linear, Conv1D) else 0


def _out_features(linear: nn.Module) -> int:
    return full_shape(linear.weight)[_out_dim(linear)]


def _in_features(linear: nn.Module) -> int:
    return full_shape(linear.weight)[1 - _out_dim(linear)]


def _common_parent(paths: list[str]) -> str:
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
