"""The neurons of a loaded model, without a Trainer: scored by any criterion, taken away with any fold."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_recycle.errors import UserError
from hf_recycle.methods.base import LossOf
from hf_recycle.methods.folding import check_can_fold, fold
from hf_recycle.methods.overtraining.callback import model_loss
from hf_recycle.methods.probe import Statistics, check_can_gather, gather_statistics
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, others, select
from hf_recycle.methods.registry import FOLDS, needs_of
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.utils.seeds import generator_for
from hf_recycle.utils.suggest import nearest


class ModelNeurons:
    """The neurons of a loaded model.

    Args:
        model: in one process, in evaluation mode.
        blocks: its feed-forward blocks.
        batches: what the model takes, with labels, on its device: for criteria and folds that look at data. Empty:
            there is none.
        loss_of: of a batch, for criteria that look at gradients.
        seed: of the criteria that draw.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[FeedForward],
        batches: Sequence[Any] = (),
        loss_of: LossOf = model_loss,
        seed: int = 0,
    ):
        self.model, self.blocks = model, list(blocks)
        self._batches, self._loss_of, self._seed = batches, loss_of, seed

    def statistics(self, names: dict[str, str]) -> list[Statistics]:
        """What the batches say of each block now. "cross_moment" is computed when it is looked up, with the weights as
        they are then, and kept for one block at a time.

        Args:
            names: some of `registry.STATISTICS`, each with the argument that asks for it.

        Raises:
            UserError: there are no batches; what is asked for can't be seen, has no room, or is not finite.
        """
        if not names:
            return [{} for _ in self.blocks]
        argument = next(iter(names.values()))
        if "token_inputs" in names:
            raise UserError(f"{argument} draws tokens while a model is trained; pass another one, such as zero_out")
        if not self._batches:
            raise UserError(_without_data(argument))
        try:
            check_can_gather(names, self.blocks)
            found = gather_statistics(
                self.model,
                self.blocks,
                names,
                lambda: self._batches,
                loss_of=self._loss_of,
                device=self.blocks[0].out_slice.device,
                seed=self._seed,
            )
        except ValueError as error:
            raise UserError(str(error).rstrip(".")) from error
        for block, values in zip(self.blocks, found, strict=True):
            if not all(value.isfinite().all() for value in values.values()):
                raise UserError(
                    f"{argument} needs finite activations, and those of {block.name} are not on this text; load the "
                    "model in float32, or use a criterion that looks at weights alone"
                )
        return found

    def scores(self, criterion: str, counts: Sequence[int]) -> list[Tensor]:
        """What a criterion says of the neurons of each block, `(d_ff,)`: the lowest go first.

        Args:
            counts: for each block, how many are to go at most. `obs` tells the order in which they do: the first of
                them are those that would go if fewer did.

        Raises:
            UserError: see `statistics`.
        """
        score = CRITERIA[criterion]
        known = self.statistics(dict.fromkeys(sorted(needs_of(score)), f"criterion={criterion!r}"))
        return [
            score(
                Signals(
                    block.magnitudes().cpu(),
                    partial(generator_for, self._seed, 0, number, "select"),
                    block.out_columns,
                    statistics,
                    None,
                    count,
                )
            )
            for number, (block, statistics, count) in enumerate(zip(self.blocks, known, counts, strict=True))
        ]

    @torch.no_grad()
    def remove(self, removed: Sequence[Tensor], how: str = "none") -> None:
        """Sets neurons to zero, after what they did has been given to the bias or to the others. Block by block, so
        that each makes up for what its predecessors have become.

        Args:
            removed: for each block, indices, int64.
            how: one of `registry.FOLDS`.

        Raises:
            UserError: see `statistics`; or the model has no place for the fold.
        """
        try:
            check_can_fold(how, self.blocks, "fold")
        except ValueError as error:
            raise UserError(str(error).rstrip(".")) from error
        known = self.statistics(dict.fromkeys(sorted(FOLDS[how]), f"fold={how!r}"))
        for block, index, statistics in zip(self.blocks, removed, known, strict=True):
            fold(how, block, statistics, index, others(block.num_neurons, index))
            block.zero_(index)

    @contextmanager
    def without(self, removed: Sequence[Tensor], how: str = "none") -> Iterator[None]:
        """Within the context neurons are gone, as by `remove`; afterwards the model is as it was, to the bit."""
        pairs = list(zip(self.blocks, removed, strict=True))
        if how == "least_squares":  # all out-columns change
            pairs = [(block, torch.arange(block.num_neurons)) for block in self.blocks]
        before = [block.read(index) for block, index in pairs]
        biases = [block.out_bias.parameter for block in self.blocks if how == "mean" and block.out_bias is not None]
        kept = [bias.detach().clone() for bias in biases]
        try:
            self.remove(removed, how)
            yield
        finally:
            for (block, index), values in zip(pairs, before, strict=True):
                block.write(index, values)
            for bias, saved in zip(biases, kept, strict=True):
                bias.data.copy_(saved)


def check_removal(criterion: str, how: str, has_data: bool) -> None:
    """Refuses, before anything is loaded, names that are unknown and what has no data to look at.

    Raises:
        UserError: as said.
    """
    check_choice("criterion", criterion, CRITERIA)
    check_choice("fold", how, FOLDS)
    for argument, needed in (
        (f"criterion={criterion!r}", needs_of(CRITERIA[criterion])),
        (f"fold={how!r}", FOLDS[how]),
    ):
        if needed and not has_data:
            raise UserError(_without_data(argument))


def check_choice(argument: str, name: str, known: Iterable[str]) -> None:
    """Refuses a name that is unknown.

    Raises:
        UserError: as said.
    """
    if name not in known:
        raise UserError(f"{argument}={name!r} is unknown; {nearest(name, known, show_all=True)}")


def _without_data(argument: str) -> str:
    return f"{argument} looks at what neurons do on data; pass eval_file, a text to look at"


def least(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` lowest scores, int64, ascending."""
    return select(scores, torch.ones(len(scores), dtype=torch.bool), count)
