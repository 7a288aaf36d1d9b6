"""What a pretrained language model loses when feed-forward neurons are taken away at once, and how much faster it gets.

`python -m benchmarks.shrink_pretrained MODEL --eval_file TEXT` takes away 25% and 50% of the neurons of every layer by
every criterion with every fold, and prints tables in Markdown. A line of the text is a sequence: the loss is of the
first `lines`, criteria and folds look at as many others.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from hf_recycle.analysis.data_scores import check_choice, least
from hf_recycle.analysis.evaluation import LanguageModel, language_model
from hf_recycle.analysis.pruning import parse_shares
from hf_recycle.analysis.shrink import ShrinkSettings, shrink
from hf_recycle.analysis.timing import Speedup, forward, speedup
from hf_recycle.analysis.verdict import Cost
from hf_recycle.cli.common import complain, no_progress_bars
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.data.loading import load_data
from hf_recycle.data.model import load_model
from hf_recycle.data.tokenizer import load_tokenizer
from hf_recycle.errors import UserError
from hf_recycle.methods.recycling.selection import CRITERIA
from hf_recycle.methods.registry import FOLDS
from hf_recycle.mlm.loss import IGNORED, token_losses
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.utils.command_line import Parser

_BATCH = 4  # sequences: the spread is over batches
_TASK = TASKS["mlm"]


@dataclass(frozen=True)
class Removed:
    """What is left of a model.

    Attributes:
        losses: of each batch, summed.
        cost: against the whole model.
        right: share of the masked tokens that it names. A loss that falls without neurons may say no more than that the
            model is less sure of its mistakes.
    """

    losses: list[float]
    cost: Cost
    right: float


Key = tuple[str, str, float]
"""Criterion, fold and share."""


def load(model: str, text: str, lines: int, length: int) -> LanguageModel:
    """A masked language model with `lines` of a text to measure on, and as many to look at.

    Raises:
        UserError: it can't be loaded, or the text has fewer lines.
    """
    tokenizer = load_tokenizer(model, length)
    arguments = DataArguments(train_file=text, validation_file=text, line_by_line=True, max_seq_length=length)
    rows = load_data(arguments, tokenizer)[1]
    assert isinstance(rows, Dataset), "a validation file is given, and not streamed"
    if len(rows) < 2 * lines:
        raise UserError(f"eval_file={text!r} has {len(rows)} lines; lines={lines} takes twice as many, pass fewer")
    loaded = load_model(ModelArguments(model_name_or_path=model, task=_TASK.name), tokenizer, length)
    some = [rows[index] for index in range(2 * lines)]
    return language_model(loaded, _TASK, some[:lines], _TASK.collator(tokenizer), _BATCH, some[lines:])


def remove(
    subject: LanguageModel, criteria: Sequence[str], folds: Sequence[str], shares: Sequence[float]
) -> Iterator[tuple[Key, Removed]]:
    """The model without a share of every layer's neurons, and then as it was: for each criterion, fold and share."""
    blocks = find_feed_forwards(subject.model)
    neurons, tokens = subject.neurons(blocks), subject.batch_tokens()
    before, _ = predict(subject)
    counts = {share: [round(share * block.num_neurons) for block in blocks] for share in shares}
    for criterion in criteria:
        scores = neurons.scores(criterion, counts[max(shares)])
        for fold in folds:
            for share in shares:
                gone = [least(*pair) for pair in zip(scores, counts[share], strict=True)]
                with neurons.without(gone, fold):
                    losses, right = predict(subject)
                yield (criterion, fold, share), Removed(losses, Cost.paired(before, losses, tokens), right)


@torch.inference_mode()
def predict(subject: LanguageModel) -> tuple[list[float], float]:
    """The loss of each batch, summed, and the share of the masked tokens that are named right."""
    losses, right = [], 0
    for batch in subject.batches:
        targets = subject.task.targets(batch["labels"])
        chosen = targets != IGNORED
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, wanted = subject.model(**inputs).logits[chosen], targets[chosen]
        losses.append(float(token_losses(logits, wanted).sum(dtype=torch.float64)))
        right += int((logits.argmax(-1) == wanted).sum())
    return losses, right / subject.tokens


def speed(subject: LanguageModel, share: float) -> Speedup:
    """Of the model without a share of every layer's neurons, which ones makes no difference; on the same texts."""
    smaller = shrink(subject.model, ShrinkSettings(fraction=share)).model.eval()
    inputs = {name: value for name, value in subject.batches[0].items() if name != "labels"}
    return speedup(forward(subject.model, inputs), forward(smaller, inputs), pairs=31)


def tables(subject: LanguageModel, found: dict[Key, Removed]) -> tuple[str, str]:
    """Losses without neurons, and shares of tokens named right: a row for each criterion. The lowest loss of a column
    is bold; a star marks those that can't be told from it, being no more than two standard deviations of the paired
    difference above it."""
    criteria = list(dict.fromkeys(criterion for criterion, _, _ in found))
    columns = sorted(dict.fromkeys((fold, share) for _, fold, share in found), key=lambda column: column[1])
    heading = ["criterion", *(f"{100 * share:g}%, {fold}" for fold, share in columns)]
    best = [min((found[name, *column] for name in criteria), key=_mean_cost) for column in columns]
    losses, rights = [heading, ["---"] * len(heading)], [heading, ["---"] * len(heading)]
    for name in criteria:
        cells = [found[name, *column] for column in columns]
        pairs = zip(cells, best, strict=True)
        losses.append([name, *(_loss(mine, lowest, subject.batch_tokens()) for mine, lowest in pairs)])
        rights.append([name, *(f"{100 * mine.right:.1f}%" for mine in cells)])
    costs = [f"{lowest.cost.mean:+.3f} ± {lowest.cost.sd:.3f}" for lowest in best]
    losses.append(["lowest, against the whole model", *costs])
    return _markdown(losses), _markdown(rights)


def _loss(mine: Removed, lowest: Removed, tokens: Sequence[int]) -> str:
    loss = f"{sum(mine.losses) / sum(tokens):.3f}"
    above = Cost.paired(lowest.losses, mine.losses, tokens)
    return f"**{loss}**" if mine is lowest else f"{loss}\\*" if above.mean <= 2 * above.sd else loss


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_cost(removed: Removed) -> float:
    return removed.cost.mean


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.shrink_pretrained", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="A masked language model: a folder, or one of the Hub.")
    parser.add_argument("--eval_file", required=True, metavar="TEXT", help="A text of its kind, a sequence a line.")
    parser.add_argument("--lines", type=int, default=64, help="Lines to measure on (default: %(default)s).")
    parser.add_argument("--max_seq_length", type=int, default=128, help="Longer lines are cut (default: %(default)s).")
    parser.add_argument("--shares", default="0.25,0.5", help="Of every layer's neurons (default: %(default)s).")
    parser.add_argument("--criteria", default=",".join(CRITERIA), help="Default: all.")
    parser.add_argument("--folds", default=",".join(FOLDS), help="Default: all.")
    try:
        print(_report(parser.parse_args(words)))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except UserError as error:
        return complain(error)
    return 0


def _report(options: argparse.Namespace) -> str:
    criteria, folds, shares = options.criteria.split(","), options.folds.split(","), parse_shares(options.shares)
    for argument, names, known in (("criteria", criteria, CRITERIA), ("folds", folds, FOLDS)):
        for name in names:
            check_choice(argument, name, known)
    if options.lines < 2 * _BATCH:
        raise UserError(f"lines={options.lines} must be at least {2 * _BATCH}: a spread needs two batches")
    no_progress_bars()
    subject = load(options.model, options.eval_file, options.lines, options.max_seq_length)
    found = {}
    for key, removed in remove(subject, criteria, folds, shares):
        print(f"{key}: {removed.cost}", file=sys.stderr, flush=True)
        found[key] = removed
    faster = [f"* without {100 * share:g}% of the neurons: {speed(subject, share)}" for share in shares if share]
    heading = (
        f"{Path(options.model).name}: loss {subject.loss():.3f} nats per masked token ({subject.tokens:,} of them, in "
        f"{options.lines} lines) with all neurons, and without a share of every layer's:"
    )
    losses, rights = tables(subject, found)
    named = f"Masked tokens named right, {100 * predict(subject)[1]:.1f}% with all neurons:"
    timing = "A forward pass, in one run, medians of 31 pairs:"
    return "\n".join([heading, "", losses, "", named, "", rights, "", timing, "", *faster])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
