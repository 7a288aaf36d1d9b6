"""What a model's neurons do on a text, and what the loss would be without some: is there anything to recycle, or to
shrink?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_recycle.analysis.data_scores import ModelNeurons, least
from hf_recycle.analysis.duplicates import duplicates
from hf_recycle.analysis.evaluation import EvaluationSettings, LanguageModel, load_language_model
from hf_recycle.analysis.scan import in_memory, scan
from hf_recycle.analysis.shrink import pruned_neurons
from hf_recycle.analysis.source import Source
from hf_recycle.analysis.verdict import HALF, NOISE_SDS, Cost, Verdict, judge
from hf_recycle.errors import UserError
from hf_recycle.methods.activity import DORMANT, WORTH_RECYCLING, is_dead, is_dormant
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.find import find_feed_forwards

CRITERION, FOLD = "obs", "least_squares"
"""What costs least: the surgeon's choice, and the others make up for it."""

KINDS = ("dead", "dormant", "duplicate")
"""What neurons are counted as."""

SHARES = (0.1, 0.25, HALF, 0.75)
"""What is taken away of every layer, by default."""


@dataclass(frozen=True)
class BlockCeiling:
    """One block.

    Attributes:
        name: name of the block.
        neurons: all but the pruned ones, whose out-column is zero.
        dead, dormant: indices of such neurons, ascending, see `Activity`.
        duplicate: indices of duplicates of earlier neurons, ascending.
        half: what taking away half of this block alone costs.
    """

    name: str
    neurons: int
    dead: list[int]
    dormant: list[int]
    duplicate: list[int]
    half: Cost

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types; "cost" and "sd" are those of half."""
        indices = {name: getattr(self, name) for name in KINDS}
        counts = {name: len(found) for name, found in indices.items()}
        costs = {"cost": self.half.mean, "sd": self.half.sd}
        return {"name": self.name, "neurons": self.neurons, **counts, **costs, "indices": indices}


@dataclass(frozen=True)
class Point:
    """A point of the curve.

    Attributes:
        share: of every layer's neurons that is taken away.
        loss: without them, nats per predicted token.
        cost: the same against the whole model.
        parameters: how many that saves.
        flops: which share of the FLOPs of a forward pass that saves.
    """

    share: float
    loss: float
    cost: Cost
    parameters: int
    flops: float

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return vars(self) | {"cost": self.cost.mean, "sd": self.cost.sd}


@dataclass(frozen=True)
class Ceiling:
    """What `hf-recycle analyze --ceiling` found in one model.

    Attributes:
        label, revision, architecture: as in `ModelAnalysis`.
        task: "mlm" or "clm".
        text: the text's file.
        tokens, batches: how many the losses are means over.
        loss: of the whole model, nats per predicted token.
        parameters: of the whole model.
        pruned: neurons whose out-column is zero, which count for nothing else.
        blocks: in the model's own order.
        curve: what taking away a share of every layer costs, ascending.
    """

    label: str
    revision: str | None
    architecture: str
    task: str
    text: str
    tokens: int
    batches: int
    loss: float
    parameters: int
    pruned: int
    blocks: list[BlockCeiling]
    curve: list[Point]

    def total(self, name: str) -> int:
        """How many neurons are of one of the `KINDS`."""
        return sum(len(getattr(block, name)) for block in self.blocks)

    @property
    def neurons(self) -> int:
        return sum(block.neurons for block in self.blocks)

    @property
    def verdict(self) -> Verdict:
        """What the rule of `verdict.py` says, and what shrinking would save."""
        half = next(point for point in self.curve if point.share == HALF)
        found = judge(self.neurons, self.total("dead"), self.total("dormant"), half.cost)
        return Verdict(found.name, (*found.sentences, self._savings()))

    @property
    def shrinkable(self) -> Point:
        """The point of the curve up to which neurons can go within the noise; if none can, the first."""
        free = self.curve[0]
        for point in self.curve:
            if not point.cost.is_noise:
                break
            free = point
        return free

    def _savings(self) -> str:
        free = self.shrinkable
        how = "within the noise" if free.cost.is_noise else "more than noise"
        return (
            f"Shrinking by {100 * free.share:g}% saves {free.parameters:,} of {self.parameters:,} parameters "
            f"({100 * free.parameters / self.parameters:.1f}%) and {100 * free.flops:.1f}% of the FLOPs, "
            f"for {free.cost}, {how}."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        verdict = self.verdict
        return {
            "model": self.label,
            "revision": self.revision,
            "architecture": self.architecture,
            "task": self.task,
            "text": PurePath(self.text).name,
            "tokens": self.tokens,
            "batches": self.batches,
            "loss": self.loss,
            "parameters": self.parameters,
            "neurons": self.neurons,
            "pruned": self.pruned,
            **{name: self.total(name) for name in KINDS},
            "criterion": CRITERION,
            "fold": FOLD,
            "blocks": [block.to_json() for block in self.blocks],
            "curve": [point.to_json() for point in self.curve],
            "verdict": {"name": verdict.name, "sentences": list(verdict.sentences)},
            "thresholds": {
                "dormant": DORMANT,
                "worth_recycling": WORTH_RECYCLING,
                "removed": HALF,
                "noise_sds": NOISE_SDS,
            },
        }


def ceiling(
    source: Source,
    evaluation: EvaluationSettings,
    shares: Sequence[float] = SHARES,
    duplicate: float = 0.99,
    pattern: str | None = None,
    ff_blocks: str | None = None,
) -> Ceiling:
    """Loads a model and measures it.

    Args:
        evaluation: the text.
        shares: of the curve; `HALF` is always among them.
        duplicate: cosine from which a neuron duplicates an earlier one.
        pattern, ff_blocks: see `find_feed_forwards`.

    Raises:
        UserError: see `load_language_model`; the text is one batch; or the model has no feed-forward block that is
            known, or whose activations can be seen.
    """
    subject = load_language_model(source, evaluation)
    if len(subject.batches) < 2:
        raise UserError(
            f"eval_file={evaluation.eval_file!r} gives one batch of {evaluation.batch_size} sequences to measure on, "
            "and noise can't be told from one; pass a longer text, or a smaller batch_size"
        )
    try:
        blocks = find_feed_forwards(subject.model, pattern, ff_blocks)
    except ValueError as error:
        raise UserError(f"{source.name}: {error}") from error
    found, curve = measure(subject, blocks, sorted({*shares, HALF} - {0.0}), duplicate)
    return Ceiling(
        label=source.label,
        revision=source.revision,
        architecture=type(subject.model).__name__,
        task=subject.task.name,
        text=evaluation.eval_file,
        tokens=subject.tokens,
        batches=len(subject.batches),
        loss=subject.loss(),
        parameters=subject.model.num_parameters(),
        pruned=sum(block.num_neurons for block in blocks) - sum(block.neurons for block in found),
        blocks=found,
        curve=curve,
    )


def measure(
    subject: LanguageModel, blocks: Sequence[FeedForward], shares: Sequence[float], duplicate: float
) -> tuple[list[BlockCeiling], list[Point]]:
    """Every block, and the curve at `shares`, ascending; the model is as it was afterwards, to the bit."""
    # Whether a neuron ever fires is asked of all of the text; choice and fold don't see what the loss is measured on.
    everywhere = ModelNeurons(subject.model, blocks, [*subject.others, *subject.batches])
    activity = [each["mean_abs"] for each in everywhere.statistics({"mean_abs": "ceiling"})]
    before, tokens = subject.batch_losses(), subject.batch_tokens()

    def without(some: Sequence[FeedForward], removed: Sequence[torch.Tensor]) -> tuple[float, Cost]:
        with subject.neurons(some).without(removed, FOLD):
            after = subject.batch_losses()
        return sum(after) / subject.tokens, Cost.paired(before, after, tokens)

    def counts(share: float) -> list[int]:
        return [round(share * block.num_neurons) for block in blocks]

    scores = subject.neurons(blocks).scores(CRITERION, counts(shares[-1]))
    found = []
    for block, mean_abs, values, count in zip(blocks, activity, scores, counts(HALF), strict=True):
        alive = torch.ones(block.num_neurons, dtype=torch.bool)
        alive[pruned_neurons(block)] = False
        found.append(
            BlockCeiling(
                name=block.name,
                neurons=int(alive.sum()),
                dead=(is_dead(mean_abs) & alive).nonzero().flatten().tolist(),
                dormant=(is_dormant(mean_abs) & alive).nonzero().flatten().tolist(),
                duplicate=duplicates(block, in_memory, scan(block, in_memory), duplicate).tolist(),
                half=without([block], [least(values, count)])[1],
            )
        )
    flops = feed_forward_share_of_flops(subject, blocks)
    curve = []
    for share in shares:
        numbers = counts(share)
        loss, cost = without(blocks, [least(*pair) for pair in zip(scores, numbers, strict=True)])
        saved = sum(
            number * sum(piece.width for piece in block.slices) for number, block in zip(numbers, blocks, strict=True)
        )
        curve.append(Point(share, loss, cost, saved, share * flops))
    return found, curve


@torch.no_grad()
def feed_forward_share_of_flops(subject: LanguageModel, blocks: Sequence[FeedForward]) -> float:
    """The share that feed-forward blocks have in the FLOPs of a forward pass, on a batch of the text."""
    mine = 0
    handles = []
    for block in blocks:
        weights = block.num_neurons * sum(piece.width for piece in block.weight_slices)

        def count(module, args, weights=weights, width=block.num_neurons):
            nonlocal mine
            mine += 2 * weights * (args[0].numel() // width)

        handles.append(block.out_slice.module.register_forward_pre_hook(count))
    inputs = {name: value for name, value in subject.batches[0].items() if name != "labels"}
    try:
        with FlopCounterMode(display=False) as counter:
            subject.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return mine / counter.get_total_flops()
