"""A model of another feed-forward width: with fewer neurons, chosen by a criterion, or with more, made by a birth."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_recycle.analysis.data_scores import ModelNeurons, least
from hf_recycle.analysis.random_inputs import outputs, random_inputs
from hf_recycle.analysis.shrink import difference_of, take_out
from hf_recycle.errors import UserError
from hf_recycle.methods.recycling.births import Options
from hf_recycle.methods.recycling.selection import others
from hf_recycle.methods.registry import REINITIALIZATIONS, needs_of
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.initial import FreshModules
from hf_recycle.neurons.table import BlockView
from hf_recycle.neurons.width import Field, Value, rebuilt, width_fields, with_neurons
from hf_recycle.utils.seeds import generator_for


@dataclass(frozen=True)
class ResizeSettings:
    """How neurons are chosen or made.

    Attributes:
        criterion, fold: of those that go, see `ModelNeurons`.
        birth: of those that come, one of `registry.REINITIALIZATIONS`.
        noise_scale: of births with noise, over the standard deviation of the matrix.
        seed: of what is drawn.
    """

    criterion: str = "low_magnitude"
    fold: str = "none"
    birth: str = "zero_out"
    noise_scale: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Resized:
    """A model of another width.

    Attributes:
        model, blocks: it, and its feed-forward blocks.
        former: for each block, which neuron each of its neurons was, int64 `(d_ff,)`; -1 for one that was added. Those
            that were there come first.
        difference: the largest difference between its outputs and those of the original, with masked and folded neurons
            where some went, on random inputs, in units of the largest output.
        note: how neurons were chosen or made, in words.
    """

    model: PreTrainedModel
    blocks: list[FeedForward]
    former: list[Tensor]
    difference: float
    note: str

    def kept(self, number: int) -> Tensor:
        """The neurons of block `number` that were there, by their former indices."""
        return self.former[number][self.former[number] >= 0]


def values_for(model: PreTrainedModel, blocks: Sequence[FeedForward], width: int) -> dict[Field, Value]:
    """What the configuration says if every block has `width` neurons.

    Raises:
        UserError: no configuration says so.
    """
    widths = sorted({block.num_neurons for block in blocks})
    if width < 1:
        raise UserError(f"width={width} must be at least 1")
    if widths == [width]:
        raise UserError(f"width={width} is the width that the model has; pass another one")
    if len(widths) > 1:
        raise UserError(
            f"width={width} can't be given to blocks of {widths[0]:,} to {widths[-1]:,} neurons; pass ff_blocks, the "
            "part of the model that is meant"
        )
    return {field: field.value_for(width / widths[0]) for field in width_fields(model, blocks)}


def resize_model(
    neurons: ModelNeurons,
    values: dict[Field, Value],
    settings: ResizeSettings,
    *,
    step: int = 0,
    pruned: Sequence[Tensor] | None = None,
    settled: Sequence[Tensor] | None = None,
    bytes_for_one: float = 1.0,
) -> Resized:
    """Builds the model of another width.

    Args:
        values: of the configuration's fields, see `values_for`.
        step: of the checkpoint, which seeds what is drawn.
        pruned: for each block, bool `(d_ff,)`: those that go first.
        settled: for each block, bool `(d_ff,)`: those that others may be made of; None: all that are not pruned.
        bytes_for_one: how many bytes have to fit into memory for each byte of weights.

    Raises:
        UserError: in a sentence, what can't be done.
    """
    model, blocks = neurons.model, neurons.blocks
    assert isinstance(model, PreTrainedModel)
    no_one = [torch.zeros(block.num_neurons, dtype=torch.bool) for block in blocks]
    pruned = no_one if pruned is None else pruned
    settled = [~mask for mask in pruned] if settled is None else settled
    widths = _widths(model, blocks, values, bytes_for_one)
    if all(width <= block.num_neurons for width, block in zip(widths, blocks, strict=True)):
        return _narrow(neurons, widths, values, settings, pruned)
    sources = [mask.nonzero().flatten() for mask in settled]
    for block, width, index in zip(blocks, widths, sources, strict=True):
        if settings.birth == "split" and width - block.num_neurons > len(index):
            raise UserError(
                f"birth='split' needs a neuron of its own for each newborn, and block {block.name} has {len(index):,} "
                f"for {width - block.num_neurons:,}; widen it to at most {block.num_neurons + len(index):,}, in "
                "several steps if need be, or pass another birth"
            )
    return _widen(neurons, values, settings, sources, step)


def _widths(
    model: PreTrainedModel, blocks: Sequence[FeedForward], values: dict[Field, Value], bytes_for_one: float
) -> list[int]:
    """The width of each block with those values, if there is room for it."""
    with torch.device("meta"):
        shapes, new_blocks = rebuilt(model, blocks, values)
    needed = round(bytes_for_one * sum(p.numel() * p.element_size() for p in shapes.parameters()))
    if needed > (free := psutil.virtual_memory().available):
        raise UserError(
            f"{new_blocks[0].num_neurons:,} neurons a block take {needed:,} bytes with the optimizer's state, and "
            f"{free:,} are free; pass a smaller width"
        )
    widths = [block.num_neurons for block in new_blocks]
    pairs = list(zip(widths, blocks, strict=True))
    if any(now < block.num_neurons for now, block in pairs) and any(now > block.num_neurons for now, block in pairs):
        raise UserError("some blocks would get more neurons and some fewer; change one part at a time, by ff_blocks")
    return widths


def _narrow(
    neurons: ModelNeurons,
    widths: list[int],
    values: dict[Field, Value],
    settings: ResizeSettings,
    pruned: Sequence[Tensor],
) -> Resized:
    counts = [block.num_neurons - width for block, width in zip(neurons.blocks, widths, strict=True)]
    scores = neurons.scores(settings.criterion, counts)
    removed = [
        least(each.double().masked_fill(mask, -torch.inf), count)
        for each, mask, count in zip(scores, pruned, counts, strict=True)
    ]
    new, blocks, difference = take_out(neurons, removed, settings.fold, values)
    former = [others(block.num_neurons, index) for block, index in zip(neurons.blocks, removed, strict=True)]
    note = f"the others went by criterion={settings.criterion}, fold={settings.fold}"
    return Resized(new, blocks, former, difference, note)


@torch.no_grad()
def _widen(
    neurons: ModelNeurons,
    values: dict[Field, Value],
    settings: ResizeSettings,
    sources: list[Tensor],
    step: int,
) -> Resized:
    model = neurons.model
    assert isinstance(model, PreTrainedModel)
    birth = REINITIALIZATIONS[settings.birth]
    known = neurons.statistics(dict.fromkeys(sorted(needs_of(birth)), f"birth={settings.birth!r}"))
    everyone = [torch.arange(block.num_neurons) for block in neurons.blocks]
    new, blocks = with_neurons(model, neurons.blocks, everyone, values)
    fresh = FreshModules(new)
    for number, (before, after) in enumerate(zip(neurons.blocks, blocks, strict=True)):
        index = torch.arange(before.num_neurons, after.num_neurons)
        generator = generator_for(settings.seed, step, number, "resize")
        options = Options(settings.noise_scale, sources[number], known[number])
        try:
            born = birth(_Widened(new, after, fresh, before), index, generator, options)
        except ValueError as error:
            raise UserError(str(error).replace("recycle_reinit", "birth").rstrip(".")) from error
        changed, lines = born.together(index)
        after.write(changed, lines)
    inputs = random_inputs(model, batch=2, length=16)
    difference = difference_of(outputs(model, inputs), outputs(new, inputs))
    former = [torch.full((block.num_neurons,), -1) for block in blocks]
    for each, index in zip(former, everyone, strict=True):
        each[: len(index)] = index
    return Resized(new, blocks, former, difference, f"-1 are new, by birth={settings.birth}")


class _Widened(BlockView):
    """A block whose last neurons have no weights yet, which count for nothing."""

    def __init__(self, model: PreTrainedModel, block: FeedForward, fresh: FreshModules, before: FeedForward):
        super().__init__(model, block, fresh)
        self._before = before

    def mean_std(self, role: str) -> tuple[Tensor, Tensor]:
        piece = self._before[role]
        return piece.storage.mean_std(piece)
