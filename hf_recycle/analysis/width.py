"""The same model with another number of feed-forward neurons."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_recycle.errors import UserError
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.find import find_feed_forwards

# What configurations call d_ff, most usual first. Any other field that holds d_ff is tried after them.
_FIELDS = ("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size", "inner_dim")


def with_neurons(
    model: PreTrainedModel, blocks: Sequence[FeedForward], kept: Sequence[Tensor], d_ff: int, pattern: str | None = None
) -> PreTrainedModel:
    """A copy of `model` whose blocks have `d_ff` neurons: those of `kept`, in their order, then neurons of zeros.

    Args:
        blocks: the model's feed-forward blocks.
        kept: for each block, the indices of the neurons to keep, at most `d_ff` of them.
        d_ff: the new width of every block.
        pattern: with which the blocks were found.

    Raises:
        UserError: no field of the configuration sets the width of these blocks and nothing else.
    """
    config = narrower_config(model, blocks, d_ff, pattern)
    # Every weight is overwritten below, so the random state that initialises them is of no account.
    with torch.random.fork_rng(devices=[]):
        new = type(model)(config).to(model.dtype)
    new_blocks = find_feed_forwards(new, pattern)
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
    return new.to(model.device).train(model.training)


def narrower_config(
    model: PreTrainedModel, blocks: Sequence[FeedForward], d_ff: int, pattern: str | None = None
) -> PreTrainedConfig:
    """The model's configuration, with the field changed that gives its feed-forward blocks `d_ff` neurons.

    A field is the right one if a model built with it has the same blocks of the new width and is else the same.
    """
    widths = {block.num_neurons for block in blocks}
    if len(widths) > 1:
        raise UserError(
            f"the layers have different widths ({sorted(widths)}), which one configuration field can't change"
        )
    old = widths.pop()
    values = model.config.to_dict()
    others = [name for name, value in values.items() if type(value) is int and value == old and name not in _FIELDS]
    expected = [(block.name, d_ff) for block in blocks]
    kept = {id(parameter) for block in blocks for parameter in block.parameters()}
    shapes = {name: tensor.shape for name, tensor in _tensors(model) if id(tensor) not in kept}
    for field in (*(name for name in _FIELDS if name in values), *others):
        config = copy.deepcopy(model.config)
        setattr(config, field, d_ff)
        try:
            with torch.device("meta"):
                trial = type(model)(config)
            found = find_feed_forwards(trial, pattern)
        except (ValueError, RuntimeError, TypeError):
            continue
        same = all(tensor.shape == shapes[name] for name, tensor in _tensors(trial) if name in shapes)
        if same and [(block.name, block.num_neurons) for block in found] == expected:
            return config
    raise UserError(
        f"no field of the configuration of {type(model).__name__} was found that sets the width of its feed-forward "
        f"blocks ({old}) and nothing else"
    )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
