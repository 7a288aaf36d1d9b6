"""One-shot pruning: the loss of a trained model against the share of its feed-forward neurons that are taken away."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_recycle.analysis.evaluation import EvaluationSettings, LanguageModel, load_language_model
from hf_recycle.analysis.source import Source
from hf_recycle.errors import UserError
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, select
from hf_recycle.methods.registry import by_weights
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.utils.seeds import generator_for
from hf_recycle.utils.suggest import nearest


@dataclass(frozen=True)
class PruneSettings:
    """Which curves to draw.

    Attributes:
        criteria: names of selection criteria; the neurons of lowest score go first.
        shares: of every layer's neurons, each in [0, 1], ascending.
        seed: of the criteria that draw.
        pattern: see `find_feed_forwards`.
    """

    criteria: tuple[str, ...] = tuple(by_weights(CRITERIA))
    shares: tuple[float, ...] = tuple(step / 10 for step in range(11))
    seed: int = 0
    pattern: str | None = None

    @classmethod
    def parse(cls, criteria: str | None, shares: str | None, seed: int, pattern: str | None) -> "PruneSettings":
        """From comma-separated words; None: all criteria, shares in tenths.

        Raises:
            UserError: an unknown criterion, or a share outside [0, 1].
        """
        names = cls.criteria if criteria is None else tuple(name.strip() for name in criteria.split(","))
        for name in names:
            check_criterion(f"criteria names the criterion {name!r}, which", name)
        return cls(names, cls.shares if shares is None else _parse_shares(shares), seed, pattern)


def check_criterion(subject: str, name: str) -> None:
    """Refuses a criterion that is unknown, or that looks at more than weights.

    Raises:
        UserError: a sentence that begins with `subject`.
    """
    known = list(by_weights(CRITERIA))
    if name not in known:
        why = "looks at activations, which it has no data for" if name in list(CRITERIA) else "is unknown"
        raise UserError(f"{subject} {why}; {nearest(name, known, show_all=True)}")


@dataclass(frozen=True)
class PruneCurves:
    """Losses of one model, in nats per predicted token.

    Attributes:
        label: how the model is called.
        task: "mlm" or "clm".
        tokens: how many tokens the losses are means over.
        shares: what was asked for; of a layer of `d_ff` neurons round(share · d_ff) are pruned.
        losses: `{criterion: one loss for each share}`.
    """

    label: str
    task: str
    tokens: int
    shares: tuple[float, ...]
    losses: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "model": self.label,
            "task": self.task,
            "tokens": self.tokens,
            "shares": list(self.shares),
            "losses": self.losses,
        }


def prune_curves(source: Source, settings: PruneSettings, evaluation: EvaluationSettings) -> PruneCurves:
    """Loads a model and measures it at every share, by every criterion.

    Raises:
        UserError: see `load_language_model`; or the model has no feed-forward block that is known.
    """
    subject = load_language_model(source, evaluation)
    try:
        blocks = find_feed_forwards(subject.model, settings.pattern)
    except ValueError as error:
        raise UserError(f"{source.name}: {error}") from error
    losses = {name: measure_curve(subject, blocks, name, settings) for name in settings.criteria}
    return PruneCurves(source.label, subject.task.name, subject.tokens, settings.shares, losses)


def measure_curve(
    subject: LanguageModel, blocks: Sequence[FeedForward], criterion: str, settings: PruneSettings
) -> list[float]:
    """The loss at each share; the model is as it was afterwards, to the bit."""
    scores = [neuron_scores(block, number, criterion, settings.seed) for number, block in enumerate(blocks)]
    losses = []
    for share in settings.shares:
        least = [least_important(block_scores, round(share * len(block_scores))) for block_scores in scores]
        with pruned(blocks, least):
            losses.append(subject.loss())
    return losses


def neuron_scores(block: FeedForward, number: int, criterion: str, seed: int) -> Tensor:
    """What a criterion says of the neurons of the block `number`, `(d_ff,)`: the lowest go first."""
    return CRITERIA[criterion](Signals(block.magnitudes().cpu(), partial(generator_for, seed, 0, number, "select")))


def least_important(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` lowest scores, int64, ascending."""
    return select(scores, torch.ones(len(scores), dtype=torch.bool), k)


@contextmanager
def pruned(blocks: Sequence[FeedForward], indices: Sequence[Tensor]) -> Iterator[None]:
    """Within the context, the neurons `indices` of each block output nothing: all that is theirs is zero."""
    before = [block.read(index) for block, index in zip(blocks, indices, strict=True)]
    try:
        for block, index, values in zip(blocks, indices, before, strict=True):
            block.write(index, {role: torch.zeros_like(value) for role, value in values.items()})
        yield
    finally:
        for block, index, values in zip(blocks, indices, before, strict=True):
            block.write(index, values)


def _parse_shares(text: str) -> tuple[float, ...]:
    try:
        shares = sorted({float(word) for word in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"shares={text!r} must be numbers in [0, 1], separated by commas")
    return tuple(shares)
