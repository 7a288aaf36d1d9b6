"""The same model with other numbers of feed-forward neurons."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_recycle.errors import UserError
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.slices import full_shape

# What configurations call d_ff, most usual first. Any other field that holds d_ff is tried after them.
_FIELDS = ("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size", "inner_dim")


@dataclass(frozen=True)
class Field:
    """A field of a configuration that sets the width of some blocks, and nothing else.

    Attributes:
        path: names of the configurations on the way to it, from the outermost one's attribute on, and its own.
        blocks: positions of the blocks.
    """

    path: tuple[str, ...]
    blocks: tuple[int, ...]

    def set(self, config: PreTrainedConfig, width: int) -> None:
        """Changes it in a configuration."""
        for name in self.path[:-1]:
            config = getattr(config, name)
        setattr(config, self.path[-1], width)


def with_neurons(
    model: PreTrainedModel, blocks: Sequence[FeedForward], kept: Sequence[Tensor], widths: dict[Field, int]
) -> PreTrainedModel:
    """A copy of `model` whose blocks hold the neurons of `kept`, in their order, then neurons of zeros.

    Args:
        blocks: the model's feed-forward blocks.
        kept: for each block, the indices of the neurons to keep, at most as many as its new width.
        widths: the new width of the blocks of each field that `width_fields` gives.
    """
    config = copy.deepcopy(model.config)
    for field, width in widths.items():
        field.set(config, width)
    # Every weight is overwritten below, so the random state that initialises them is of no account.
    with torch.random.fork_rng(devices=[]):
        new = type(model)(config)
        new.to(model.dtype)  # type: ignore[arg-type]  # transformers hides the signature
    paths = _paths(model)
    new_blocks = [moved for block in blocks if (moved := _moved(block, paths, new)) is not None]
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
    return new.train(model.training)


def width_fields(model: PreTrainedModel, blocks: Sequence[FeedForward]) -> list[Field]:
    """The fields of the model's configuration, and of those in it, that set the width of its blocks, one for each.

    A field is one if a model built with another value of it has some of the blocks with that width, and is else the
    same.

    Raises:
        UserError: some block has none.
    """
    widths = {block.num_neurons for block in blocks}
    left, fields = set(range(len(blocks))), []
    for path in _candidates(model.config, widths):
        field = _try(model, blocks, path)
        if field is not None and left.issuperset(field.blocks):
            fields.append(field)
            left.difference_update(field.blocks)
        if not left:
            return fields
    first = blocks[min(left)]
    raise UserError(
        f"no field of the configuration of {type(model).__name__} sets the width of {first.name} ({first.num_neurons} "
        f"neurons) and nothing but widths of feed-forward blocks, so no smaller {type(model).__name__} can be built"
    )


def _candidates(config: PreTrainedConfig, widths: set[int]) -> Iterator[tuple[str, ...]]:
    values = vars(config)
    known = [name for name in _FIELDS if name in values]
    for name in (*known, *(name for name in values if name not in known)):
        value = values[name]
        # GPT-2's n_inner is None for 4 · n_embd.
        if (type(value) is int and value in widths) or (value is None and name in _FIELDS):
            yield (name,)
        elif isinstance(value, PreTrainedConfig):
            yield from ((name, *path) for path in _candidates(value, widths))


def _try(model: PreTrainedModel, blocks: Sequence[FeedForward], path: tuple[str, ...]) -> Field | None:
    config = copy.deepcopy(model.config)
    field = Field(path, ())
    probe = max(1, max(block.num_neurons for block in blocks) // 2)
    field.set(config, probe)
    try:
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
    changed = [n for n, (old, new) in enumerate(zip(blocks, moved, strict=True)) if new.num_neurons != old.num_neurons]
    fits = changed and all(moved[n].num_neurons == probe for n in changed)
    return Field(path, tuple(changed)) if fits else None


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


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
