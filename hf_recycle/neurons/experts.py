"""Experts whose weights lie in parameters of all experts of a layer, one matrix behind the other: a block for each."""

from typing import Any

from torch import nn

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.families import Layout
from hf_recycle.neurons.slices import full_shape

# Names of parameters of shape (experts, out, in), or (experts, in, out), relative to the module that holds them.
EXPERT_LAYOUTS = (
    Layout(("gate_up_proj",), "down_proj", fused=True),
    Layout(("gate_proj", "up_proj"), "down_proj"),
    Layout(("up_proj",), "down_proj"),
    Layout(("input_linear.weight",), "output_linear.weight", fused=True),
)


def find_experts(path: str, holder: nn.Module) -> list[FeedForward]:
    """The experts whose weights the module `holder`, at `path`, holds; none if it holds none of a known layout."""
    return next(filter(None, (experts_of(path, holder, layout) for layout in EXPERT_LAYOUTS)), [])


def experts_of(path: str, holder: nn.Module, layout: Layout) -> list[FeedForward]:
    """The experts that `layout` describes under `holder`, at `path`, in their own order; none if its parameters are
    missing or do not fit together."""
    found = []
    for name in (*layout.ins, layout.out):
        if (place := _locate(holder, name)) is None:
            return []
        found.append(place)
    *ins, out = found
    shapes = [full_shape(getattr(*place)) for place in found]
    halves = 2 if layout.fused else 1
    transposed = _is_transposed(holder, shapes, halves)
    if transposed is None:
        return []
    count, d_ff, neurons_first = shapes[-1][0], shapes[-1][1 if transposed else 2], 1 if transposed else 0
    if layout.fused:
        # transformers says of its own experts how a fused matrix is read.
        interleaved = not getattr(holder, "is_concatenated", True)
        parts = [(ins[0], half if interleaved else half * d_ff, 2 if interleaved else 1) for half in range(2)]
    else:
        parts = [(place, 0, 1) for place in ins]
    roles = ("gate", "up") if layout.gated else ("in",)
    blocks = []
    for expert in range(count):
        slices = []
        for role, ((module, name), offset, stride) in zip(roles, parts, strict=True):
            slices.append(NeuronSlice(role, module, name, neurons_first, offset, d_ff, stride, expert))
            bias = _bias(module, name)
            if bias is not None:
                slices.append(NeuronSlice(f"{role}.bias", module, bias, 0, offset, d_ff, stride, expert))
        slices.append(NeuronSlice("out", *out, 1 - neurons_first, 0, d_ff, 1, expert))
        name = f"{path}.{expert}" if path else str(expert)
        blocks.append(FeedForward(name, d_ff, layout.gated, tuple(slices), path))
    return blocks


def _locate(holder: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module and the attribute of a parameter with a matrix for each expert."""
    *path, attribute = name.split(".")
    module: Any = holder
    for child in path:
        module = getattr(module, child, None)
    parameter = getattr(module, attribute, None)
    if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
        return None
    shape = full_shape(parameter)
    return (module, attribute) if len(shape) == 3 and all(shape) else None


def _bias(module: nn.Module, name: str) -> str | None:
    bias = "bias" if name == "weight" else f"{name}_bias"
    return bias if isinstance(getattr(module, bias, None), nn.Parameter) else None


def _is_transposed(holder: nn.Module, shapes: list, halves: int) -> bool | None:
    """Whether matrices are (in, out) rather than (out, in); None if they do not fit together.

    The shapes tell it of a fused matrix. Of others transformers does, for its own experts.
    """
    *ins, out = shapes
    fits = []
    for transposed in (False, True):
        d_model, d_ff = (out[2], out[1]) if transposed else (out[1], out[2])
        wide = (d_model, halves * d_ff) if transposed else (halves * d_ff, d_model)
        # Experts that do nothing have in-rows in some models, and no out-columns.
        fits.append(all(shape[0] >= out[0] and tuple(shape[1:]) == wide for shape in ins))
    if all(fits):
        return bool(getattr(holder, "is_transposed", False))
    return None if not any(fits) else fits[1]
