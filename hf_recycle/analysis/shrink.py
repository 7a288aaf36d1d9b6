"""Taking feed-forward neurons out of a model, so that a smaller plain transformers model remains.

A configuration knows one width for all layers, or for those of each part of a model, or a ratio to the width of the
model. It becomes what the layer needs that keeps most of its neurons, rounded up; the others are filled up with neurons
of zeros. A neuron whose
out-column is zero outputs nothing, whatever its in-row, its bias and the activation are: it is *pruned*, and leaving it
out changes nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_recycle.analysis.data_scores import ModelNeurons, least
from hf_recycle.analysis.evaluation import LanguageModel
from hf_recycle.analysis.random_inputs import outputs, random_inputs
from hf_recycle.errors import UserError
from hf_recycle.methods.recycling.selection import others
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.neurons.width import Field, Value, width_fields, with_neurons


@dataclass(frozen=True)
class Shrunk:
    """A smaller model and what was done to get it.

    Attributes:
        model: the smaller model.
        widths: for each block, its neurons before and now.
        kept: for each block, the indices of the neurons it kept, int64, ascending.
        difference: largest difference between its outputs and those of the original with the same neurons masked, on
            random inputs, in units of the largest output.
    """

    model: PreTrainedModel
    widths: dict[str, tuple[int, int]]
    kept: dict[str, Tensor]
    difference: float

    @property
    def d_ff(self) -> int:
        """Neurons of a block now: of the widest one."""
        return max(now for _, now in self.widths.values())


@dataclass(frozen=True)
class ShrinkSettings:
    """Which neurons go.

    Attributes:
        fraction: share of every layer's neurons, floor(fraction · d_ff); None: the pruned ones alone.
        criterion: selection criterion; the neurons of lowest score go.
        fold: what becomes of what they did, one of `registry.FOLDS`.
        multiple_of: the new width is a multiple of it, unless that is more than the old width.
        seed: of the criteria that draw.
        pattern, ff_blocks: see `find_feed_forwards`.
    """

    fraction: float | None = None
    criterion: str = "low_magnitude"
    fold: str = "none"
    multiple_of: int = 8
    seed: int = 0
    pattern: str | None = None
    ff_blocks: str | None = None


# Rounding in another order of summation; float32 and wider give far less.
_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 8e-2}


def shrink(model: PreTrainedModel, settings: ShrinkSettings, text: LanguageModel | None = None) -> Shrunk:
    """Builds the smaller model and checks that it computes what the original computes without those neurons.

    Args:
        text: the model with batches, for a criterion or a fold that looks at data.

    Raises:
        UserError: no feed-forward block is known, nothing is pruned, a layer would be left with no neuron, there is no
            text to look at, or the outputs differ.
    """
    try:
        blocks = find_feed_forwards(model, settings.pattern, settings.ff_blocks)
    except ValueError as error:
        raise UserError(str(error)) from error
    neurons = ModelNeurons(model, blocks, seed=settings.seed) if text is None else text.neurons(blocks, settings.seed)
    removed = removed_neurons(neurons, settings)
    kept = [others(block.num_neurons, index) for block, index in zip(blocks, removed, strict=True)]
    shares = [_width(len(index), block, settings.multiple_of) for index, block in zip(kept, blocks, strict=True)]
    fields = width_fields(model, blocks)
    values = {field: field.value_for(max(shares[n] for n in field.blocks)) for field in fields}
    new, new_blocks, difference = take_out(neurons, removed, settings.fold, values)
    names = [block.name for block in blocks]
    widths = [(old.num_neurons, now.num_neurons) for old, now in zip(blocks, new_blocks, strict=True)]
    return Shrunk(new, dict(zip(names, widths, strict=True)), dict(zip(names, kept, strict=True)), difference)


def take_out(
    neurons: ModelNeurons, removed: Sequence[Tensor], fold: str, values: dict[Field, Value]
) -> tuple[PreTrainedModel, list[FeedForward], float]:
    """A model without neurons `removed` of each block, its blocks, and by how much its outputs differ, on random
    inputs, from those of the original with them masked and folded.

    Args:
        values: of the configuration's fields that set the widths; what is wider than it needs is filled up with zeros.

    Raises:
        UserError: see `ModelNeurons.remove`; or the new model does not compute what the masked one does.
    """
    model: Any = neurons.model
    kept = [others(block.num_neurons, index) for block, index in zip(neurons.blocks, removed, strict=True)]
    inputs = random_inputs(model, batch=2, length=16)
    with neurons.without(removed, fold):
        new, new_blocks = with_neurons(model, neurons.blocks, kept, values)
        try:
            difference = difference_of(outputs(model, inputs), outputs(new, inputs))
        except RuntimeError as error:
            raise UserError(
                f"a {type(model).__name__} of {new_blocks[0].num_neurons} neurons does not compute "
                f"({str(error).splitlines()[0]}): pass another width or multiple_of"
            ) from error
    if math.isnan(difference):
        raise UserError("the model's outputs are NaN or infinite; this checkpoint is broken, use an earlier one")
    if not difference <= _TOLERANCES.get(model.dtype, 1e-3):
        raise UserError(
            f"the smaller model's outputs differ from those of the masked one by {difference:.2g}: its feed-forward "
            "blocks do more than W_out f(W_in x), and can't be shrunk"
        )
    return new, new_blocks, difference


def _width(kept: int, block: FeedForward, multiple_of: int) -> float:
    """What so many neurons take, as a share of a block's width: a multiple of a number, or all."""
    return min(-(-kept // multiple_of) * multiple_of, block.num_neurons) / block.num_neurons


def removed_neurons(neurons: ModelNeurons, settings: ShrinkSettings) -> list[Tensor]:
    """For each block, the indices of the neurons that go, int64, ascending."""
    blocks = neurons.blocks
    if settings.fraction is None:
        removed = [pruned_neurons(block) for block in blocks]
        if not any(len(index) for index in removed):
            raise UserError(
                "no neuron of this model is pruned (has an out-column of zeros); pass fraction to remove the least "
                "important ones"
            )
        if all(len(index) == block.num_neurons for index, block in zip(removed, blocks, strict=True)):
            raise UserError("every neuron of this model is pruned, and no model can have layers without neurons")
        return removed
    # A hair more: 0.3 · 10 is 3, though not in binary.
    counts = [int(settings.fraction * block.num_neurons + 1e-9) for block in blocks]
    for block, count in zip(blocks, counts, strict=True):
        if count >= block.num_neurons:
            raise UserError(
                f"fraction={settings.fraction} leaves block {block.name} with none of its {block.num_neurons} neurons; "
                "pass a smaller one"
            )
    return [least(*pair) for pair in zip(neurons.scores(settings.criterion, counts), counts, strict=True)]


def pruned_neurons(block: FeedForward) -> Tensor:
    """Indices of the neurons that output nothing, int64, ascending."""
    return (block.norms()[1] == 0).nonzero().flatten().cpu()


def check_pruned_are_zero(blocks: Sequence[FeedForward], masks: dict[str, Tensor]) -> None:
    """Refuses a model whose recycling state calls neurons pruned that are not zero.

    Args:
        masks: for each block, bool `(d_ff,)`.

    Raises:
        UserError: naming the first such block.
    """
    for block in blocks:
        mask = masks.get(block.name)
        if mask is None:
            continue
        if len(mask) != block.num_neurons:
            raise UserError(
                f"the recycling state knows {len(mask)} neurons of block {block.name}, and the model has "
                f"{block.num_neurons}; they are not of one checkpoint"
            )
        alive = mask.clone()
        alive[pruned_neurons(block)] = False
        if alive.any():
            raise UserError(
                f"block {block.name}: {int(alive.sum())} neurons that the recycling state calls pruned are not zero in "
                "the weights; this checkpoint was changed after it was written, use the original"
            )


def difference_of(first: Tensor, second: Tensor) -> float:
    """The largest difference between two outputs, in units of the largest entry of the first."""
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-12))
