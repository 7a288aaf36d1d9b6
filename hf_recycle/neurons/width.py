"""The same model with other numbers of feed-forward neurons."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_recycle.errors import UserError
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.slices import full_shape

# What configurations call d_ff, most usual first. Other fields that hold d_ff, or twice as much, are tried after them,
# and so are ratios of d_ff and d_model.
_FIELDS = ("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size", "inner_dim")
_RATIO = re.compile("ratio|factor|mult|expansion|expand")

Value = int | float


@dataclass(frozen=True)
class Field:
    """A number in a configuration that sets the width of some blocks, and nothing else.

    Attributes:
        path: names of the configurations on the way to it, from the outermost one's attribute on, and its own; where it
            is one of a list, its place there at the end.
        value: what it is now; the blocks' widths are proportional to it.
        blocks: positions of the blocks.
    """

    path: tuple[str | int, ...]
    value: Value
    blocks: tuple[int, ...]

    def put(self, config: PreTrainedConfig, value: Value) -> None:
        """Changes it in a configuration."""
        path: list[Any] = list(self.path)
        if isinstance(path[-1], int):
            place = path.pop()
            old = _get(config, path)
            value = type(old)([*old[:place], value, *old[place + 1 :]])
        setattr(_get(config, path[:-1]), path[-1], value)

    def get(self, config: PreTrainedConfig) -> Value:
        """What it is in a configuration."""
        path: list[Any] = list(self.path)
        place = path.pop() if isinstance(path[-1], int) else None
        found = _get(config, path)
        return found if place is None else found[place]

    def value_for(self, share: float) -> Value:
        """The least value that gives the blocks this share of their width, or more."""
        value = share * self.value
        if isinstance(self.value, int):
            return math.ceil(value - 1e-9)
        return math.ceil(value * 1e6 - 1e-3) / 1e6  # models round down what they compute from it


def with_neurons(
    model: PreTrainedModel, blocks: Sequence[FeedForward], kept: Sequence[Tensor], values: dict[Field, Value]
) -> tuple[PreTrainedModel, list[FeedForward]]:
    """A copy of `model` whose blocks hold the neurons of `kept`, in their order, then neurons of zeros; and those
    blocks.

    Args:
        blocks: the model's feed-forward blocks.
        kept: for each block, the indices of the neurons to keep, at most as many as its new width.
        values: a new value of each field that `width_fields` gives.
    """
    new, new_blocks = rebuilt(model, blocks, values)
    neurons = {id(parameter) for block in new_blocks for parameter in block.parameters()}
    old = dict(_tensors(model))
    with torch.no_grad():
        for name, tensor in _tensors(new):
            if id(tensor) in neurons:
                tensor.zero_()
            else:
                tensor.copy_(old[name])
    for new_block, block, index in zip(new_blocks, blocks, kept, strict=True):
        new_block.write(torch.arange(len(index)), block.read(index))
    if hasattr(model, "generation_config"):
        new.generation_config = model.generation_config
    new.to(model.device)  # type: ignore[arg-type]  # the same
    return new.train(model.training), new_blocks


def rebuilt(
    model: PreTrainedModel, blocks: Sequence[FeedForward], values: dict[Field, Value]
) -> tuple[PreTrainedModel, list[FeedForward]]:
    """A model of the same class and dtype with other values of some fields, freshly initialised, and its blocks; the
    random state stays. On the meta device within `torch.device("meta")`."""
    config = copy.deepcopy(model.config)
    for field, value in values.items():
        field.put(config, value)
    with torch.random.fork_rng(devices=[]):
        new = type(model)(config)
        new.to(model.dtype)  # type: ignore[arg-type]  # transformers hides the signature
    paths = _paths(model)
    return new, [moved for block in blocks if (moved := _moved(block, paths, new)) is not None]


def width_fields(model: PreTrainedModel, blocks: Sequence[FeedForward]) -> list[Field]:
    """The fields of the model's configuration, and of those in it, that set the width of its blocks, one for each.

    A field is one if a model built with half of its value has some of the blocks with half of their width, and is else
    the same.

    Raises:
        UserError: some block has none.
    """
    widths = {block.num_neurons for block in blocks}
    left, fields = set(range(len(blocks))), []
    for path, value in _candidates(model.config, widths):
        field = _try(model, blocks, path, value)
        if field is not None and left.issuperset(field.blocks):
            fields.append(field)
            left.difference_update(field.blocks)
        if not left:
            return fields
    first = blocks[min(left)]
    raise UserError(
        f"no field of the configuration of {type(model).__name__} makes {first.name} ({first.num_neurons} neurons) "
        f"smaller and changes nothing but widths of feed-forward blocks, so no smaller {type(model).__name__} can be "
        "built"
    )


def _candidates(config: PreTrainedConfig, widths: set[int]) -> Iterator[tuple[tuple[str | int, ...], Value]]:
    values = vars(config)
    known = [name for name in _FIELDS if name in values]
    for name in (*known, *(name for name in values if name not in known)):
        value = values[name]
        if isinstance(value, PreTrainedConfig):
            yield from (((name, *path), number) for path, number in _candidates(value, widths))
        elif isinstance(value, list | tuple):
            yield from (((name, n), number) for n, number in enumerate(value) if _may_set(name, number, widths))
        elif _may_set(name, value, widths):
            yield (name,), value
        elif value is None and name in _FIELDS:  # GPT-2's n_inner is None for 4 · n_embd
            yield from (((name,), width) for width in widths)


def _may_set(name: str, value: Any, widths: set[int]) -> bool:
    if type(value) is int and ({value, value // 2} & widths):
        return True
    return type(value) in (int, float) and value > 0 and _RATIO.search(name) is not None


def _try(model: PreTrainedModel, blocks: Sequence[FeedForward], path: tuple[str | int, ...], value: Value):
    config = copy.deepcopy(model.config)
    half = max(1, value // 2) if isinstance(value, int) else value / 2
    field = Field(path, value, ())
    try:
        field.put(config, half)
        with torch.device("meta"):
            trial = type(model)(config)
    except Exception:  # what a class says of a width it can't have
        return None
    neurons = {id(parameter) for block in blocks for parameter in block.parameters()}
    shapes = {name: tensor.shape for name, tensor in _tensors(trial)}
    if any(shapes.get(name) != tensor.shape for name, tensor in _tensors(model) if id(tensor) not in neurons):
        return None
    paths = _paths(model)
    moved = [found for block in blocks if (found := _moved(block, paths, trial)) is not None]
    if len(moved) < len(blocks):
        return None
    pairs = [(old.num_neurons, new.num_neurons) for old, new in zip(blocks, moved, strict=True)]
    changed = tuple(n for n, (old, new) in enumerate(pairs) if new != old)
    fits = changed and all(abs(pairs[n][1] - pairs[n][0] * half / value) < 1 for n in changed)
    return replace(field, blocks=changed) if fits else None


def _moved(block: FeedForward, paths: dict[int, str], other: nn.Module) -> FeedForward | None:
    """The same block of another model of the class, whatever its width; None if it is not made alike."""
    out = _place(block.out_slice, paths, other)
    width = out.matrix_shape[out.dim]
    slices = []
    for piece in block.slices:
        mine = _place(piece, paths, other)
        before, after = full_shape(piece.parameter), full_shape(mine.parameter)
        halves = piece.matrix_shape[piece.dim] // block.num_neurons
        dim = piece.dim if piece.expert is None else piece.dim + 1
        if len(before) != len(after) or (*before[:dim], halves * width, *before[dim + 1 :]) != tuple(after):
            return None
        offset = piece.offset if piece.stride > 1 else piece.offset // block.num_neurons * width
        slices.append(replace(mine, offset=offset, length=width))
    return replace(block, num_neurons=width, slices=tuple(slices))


def _place(piece, paths: dict[int, str], other: nn.Module):
    return replace(piece, module=other.get_submodule(paths[id(piece.module)]))


def _get(config: PreTrainedConfig, path: Sequence[str]):
    for name in path:
        config = getattr(config, name)
    return config


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
