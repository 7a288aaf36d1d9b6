"""Finds the feed-forward blocks of a model, and modules that look like one but have an unknown layout."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.by_shape import candidates, match_by_shape
from hf_recycle.neurons.experts import experts_of, find_experts
from hf_recycle.neurons.families import FAMILIES, Layout, known_layouts, parse_layout
from hf_recycle.neurons.layers import Layers, common_parent, lies_beside
from hf_recycle.neurons.left_out import LeftOut, left_out, summary, token_mixers
from hf_recycle.neurons.linear import in_features, is_linear, out_dim, out_features
from hf_recycle.neurons.towers import of_tower


@dataclass(frozen=True)
class Survey:
    """What was found in a model.

    Attributes:
        blocks: the feed-forward blocks, in the model's own order.
        left_out: modules that look like one, and whose layout is unknown.
    """

    blocks: list[FeedForward]
    left_out: list[LeftOut]


def find_feed_forwards(model: nn.Module, pattern: str | None = None, ff_blocks: str | None = None) -> list[FeedForward]:
    """The feed-forward blocks of `model`, in the model's own order; a block shared by several layers appears once, each
    expert of a mixture is a block.

    Args:
        model: the unwrapped model.
        pattern: a layout that overrides the search, such as `"fc1 -> fc2"`, `"gate + up -> down"` or
            `"fused:Wi -> Wo"`, with the paths of the linear layers relative to a module that holds them.
        ff_blocks: of a composite model, the part whose blocks are wanted, such as `"vision"` or `"decoder"`: a word of
            the path of its module. All parts by default.

    Raises:
        ValueError: if no block is found; the message lists the pairs of linear layers that could be one.
    """
    return survey(model, pattern, ff_blocks).blocks


def survey(model: nn.Module, pattern: str | None = None, ff_blocks: str | None = None) -> Survey:
    """The blocks of a model with what was left out; see `find_feed_forwards`."""
    layers = Layers(model)
    if pattern is not None:
        found = Survey(_match_pattern(model, layers, pattern), [])
    else:
        blocks = _search(model, layers)
        found = Survey(blocks, left_out(layers, blocks))
        if not blocks:
            raise ValueError(f"No feed-forward block was found in {_describe(model)}. {_why_none(layers, found)}")
    if ff_blocks is None:
        return found
    return Survey(of_tower(found.blocks, ff_blocks), of_tower(found.left_out, ff_blocks, required=False))


def _match_pattern(model: nn.Module, layers: Layers, pattern: str) -> list[FeedForward]:
    layout = parse_layout(pattern)
    blocks = _distinct(
        block
        for path, module in layers.modules.items()
        for block in (_build(layers, path, layout) or experts_of(path, module, layout))
    )
    if not blocks:
        spans = any(_linears(layers, path, layout) for path in layers.modules)
        why = ": these layers do not lie within one layer of the model" if spans else ""
        raise ValueError(
            f"ff_pattern={pattern!r} matches nothing in {_describe(model)}{why}. {_hint(layers, left_out(layers, []))}"
        )
    return blocks


def _search(model: nn.Module, layers: Layers) -> list[FeedForward]:
    """By the layouts of the model's own families, then in its layers by all known ones, then, in each layer that has no
    block yet, by shape."""
    model_types = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    own = [layout for name, layouts in FAMILIES.items() if name in model_types for layout in layouts]
    blocks = _distinct(
        (
            *_by_layout(layers, own, anywhere=True),
            *_by_layout(layers, known_layouts(), anywhere=not layers),
            *(block for path, module in layers.modules.items() for block in find_experts(path, module)),
        )
    )
    found = {layers.layer_of(block.holder) for block in blocks}
    for layout, path in match_by_shape(layers, found):
        blocks += _build(layers, path, layout)
    order = {path: position for position, path in enumerate(layers.modules)}
    blocks = sorted(_distinct(blocks), key=lambda block: (order[block.holder], block.slices[-1].expert or 0))
    return list(_with_names_apart(layers, blocks))


def _with_names_apart(layers: Layers, blocks: Iterable[FeedForward]) -> Iterator[FeedForward]:
    """The blocks; the second one of a module that holds several is named after its in-projection."""
    names: set[str] = set()
    paths = {id(module): path for path, module in layers.modules.items()}
    for block in blocks:
        yield replace(block, name=paths[id(block.slices[0].module)]) if block.name in names else block
        names.add(block.name)


def _by_layout(layers: Layers, layouts: Iterable[Layout], *, anywhere: bool) -> Iterator[FeedForward]:
    # A gated block has the layers of a plain one too.
    layouts = sorted(layouts, key=lambda layout: not layout.gated)
    for path, module in layers.modules.items():
        children = dict(module.named_children())
        for layout in layouts:
            if layout.out.partition(".")[0] not in children:
                continue  # most are settled here
            for block in _build(layers, path, layout, whole=True):
                if (anywhere or layers.layer_of(block.name)) and not lies_beside(block.name):
                    yield block


def _distinct(blocks: Iterable[FeedForward]) -> list[FeedForward]:
    found: dict[tuple, FeedForward] = {}
    for block in blocks:
        out = block.slices[-1]
        found.setdefault((id(out.parameter), out.expert), block)
    return list(found.values())


def _build(layers: Layers, path: str, layout: Layout, *, whole: bool = False) -> list[FeedForward]:
    """The block that `layout` describes under the module at `path`; none if its layers are missing, do not fit together
    or lie in several layers of the model.

    Args:
        whole: none either if another layer beside the in-projection has its shape, such as a gate.
    """
    linears = _linears(layers, path, layout)
    if linears is None:
        return []
    paths = [f"{path}.{relative}" if path else relative for relative in (*layout.ins, layout.out)]
    if not layers.within_one(paths) or (whole and _has_another(layers, path, layout, linears)):
        return []
    *ins, out = linears
    d_ff = in_features(out)
    roles = ("gate", "up") if layout.gated else ("in",)
    parts = [(ins[0], i * d_ff) for i in range(2)] if layout.fused else [(linear, 0) for linear in ins]
    slices = []
    for role, (linear, offset) in zip(roles, parts, strict=True):
        slices.append(NeuronSlice(role, linear, "weight", out_dim(linear), offset, d_ff))
        if linear.bias is not None:
            slices.append(NeuronSlice(f"{role}.bias", linear, "bias", 0, offset, d_ff))
    slices.append(NeuronSlice("out", out, "weight", 1 - out_dim(out), 0, d_ff))
    holder = common_parent(paths)
    return [FeedForward(holder, d_ff, layout.gated, tuple(slices), holder)]


def _linears(layers: Layers, path: str, layout: Layout) -> list[nn.Module] | None:
    """The linear layers that `layout` names, its out-projection last; None if one is missing or shapes do not fit."""
    found = (_submodule(layers.modules[path], relative) for relative in (*layout.ins, layout.out))
    linears = [module for module in found if is_linear(module)]
    if len(linears) <= len(layout.ins):
        return None
    *ins, out = linears
    shape = out_features(out), in_features(out) * (2 if layout.fused else 1)
    return linears if all((in_features(linear), out_features(linear)) == shape for linear in ins) else None


def _has_another(layers: Layers, path: str, layout: Layout, linears: list[nn.Module]) -> bool:
    first, out = linears[0], linears[-1]
    if in_features(out) == out_features(out):
        return False  # anything square has that shape
    parent = layers.modules[path].get_submodule(layout.ins[0].rpartition(".")[0])
    return any(
        is_linear(other)
        and not any(other is linear for linear in linears)
        and (in_features(other), out_features(other)) == (in_features(first), out_features(first))
        for other in parent.children()
    )


def _why_none(layers: Layers, found: Survey) -> str:
    hint = _hint(layers, found.left_out)
    mixers = token_mixers(layers)
    if mixers and not found.left_out and not candidates(layers):
        return f"Its layers hold none: they are made of {', '.join(mixers)}, which mix tokens."
    return hint


def _hint(layers: Layers, others: list[LeftOut]) -> str:
    """What a user could name as a block, or why there is nothing."""
    pairs = candidates(layers)
    if pairs:
        shown = "; ".join(pairs[:6]) + ("; ..." if len(pairs) > 6 else "")
        return f"Name its layers with ff_pattern='in -> out'; pairs of linear layers that could be a block: {shown}."
    if others:
        return f"What looks like one can't be used: {summary(others)}."
    return "It holds no pair of linear layers d -> f, f -> d that could be one."


def _describe(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")


def _submodule(holder: nn.Module | None, relative: str) -> nn.Module | None:
    for name in relative.split("."):
        holder = getattr(holder, name, None)
    return holder if isinstance(holder, nn.Module) else None
