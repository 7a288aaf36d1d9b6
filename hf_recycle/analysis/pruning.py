"""One-shot pruning: the loss of a trained model against the share of its feed-forward neurons that are taken away."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_recycle.analysis.data_scores import check_choice, least
from hf_recycle.analysis.evaluation import EvaluationSettings, LanguageModel, load_language_model
from hf_recycle.analysis.source import Source
from hf_recycle.errors import UserError
from hf_recycle.methods.recycling.selection import CRITERIA
from hf_recycle.methods.registry import FOLDS, by_weights
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.find import find_feed_forwards


@dataclass(frozen=True)
class PruneSettings:
    """Which curves to draw.

    Attributes:
        criteria: names of selection criteria; the neurons of lowest score go first.
        shares: of every layer's neurons, each in [0, 1], ascending.
        seed: of the criteria that draw.
        pattern: see `find_feed_forwards`.
        fold: what becomes of what they did, one of `registry.FOLDS`.
    """

    criteria: tuple[str, ...] = tuple(by_weights(CRITERIA))
    shares: tuple[float, ...] = tuple(step / 10 for step in range(11))
    seed: int = 0
    pattern: str | None = None
    fold: str = "none"

    @classmethod
    def parse(
        cls, criteria: str | None, shares: str | None, seed: int, pattern: str | None, fold: str = "none"
    ) -> "PruneSettings":
        """From comma-separated words; None: all criteria, shares in tenths.

        Raises:
            UserError: an unknown criterion, or a share outside [0, 1].
        """
        names = cls.criteria if criteria is None else tuple(name.strip() for name in criteria.split(","))
        for name in names:
            check_choice("criteria", name, CRITERIA)
        check_choice("fold", fold, FOLDS)
        return cls(names, cls.shares if shares is None else parse_shares(shares), seed, pattern, fold)


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
    neurons = subject.neurons(blocks, settings.seed)
    counts = [[round(share * block.num_neurons) for block in blocks] for share in settings.shares]
    scores = neurons.scores(criterion, counts[-1])
    losses = []
    for numbers in counts:
        with neurons.without([least(*pair) for pair in zip(scores, numbers, strict=True)], settings.fold):
            losses.append(subject.loss())
    return losses


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares in ascending order, from words between commas.

    Raises:
        UserError: one is no number in [0, 1].
    """
    try:
        shares = sorted({float(word) for word in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"shares={text!r} must be numbers in [0, 1], separated by commas")
    return tuple(shares)
