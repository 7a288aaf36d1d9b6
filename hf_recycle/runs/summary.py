"""The short summary that is printed at the end of a run."""

import math
import shlex

import numpy as np

from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.naming import short_names
from hf_recycle.records.recorder import QUANTILE_LEVELS
from hf_recycle.records.times import group_times
from hf_recycle.utils.command_words import our_command, path_word

_BAR = 40
_TIMES = 8
_BLOCKS = 6


def summary_text(
    history: RecyclingHistory,
    *,
    unigram_entropy: float | None = None,
    model_folder: str | None = None,
    auto_class: str = "AutoModelForMaskedLM",
) -> str:
    """What came out of a run, in at most 30 lines of at most 100 columns.

    Args:
        history: what happened.
        unigram_entropy: entropy of the corpus's unigrams in nats: the loss of a model that knows how frequent
            each token is and nothing else.
        model_folder: where the model is; adds the Python that loads it (only a long path passes 100 columns).
        auto_class: the transformers class that loads it.
    """
    parts = [
        [f"After {history.stats['step']:,} optimizer steps"],
        _losses(history, unigram_entropy),
        _neurons(history),
        _pruned(history),
        _overtrained(history),
        _magnitudes(history),
        _loading(model_folder, auto_class),
    ]
    return "\n".join(line for part in parts for line in part)


def _losses(history: RecyclingHistory, unigram_entropy: float | None) -> list[str]:
    logs = history.logs
    lines = []
    for label, column in (("training loss", "loss"), ("evaluation loss", "eval_loss")):
        if column not in logs or not len(values := logs[column].dropna()):
            continue
        first, last = values.iloc[0], values.iloc[-1]
        line = f"  {label:<17}{first:.4f} → {last:.4f} nats" if len(values) > 1 else f"  {label:<17}{last:.4f} nats"
        if column == "eval_loss":
            line += f", perplexity {_perplexity(last)}"
            if "eval_accuracy" in logs and logs["eval_accuracy"].notna().any():
                line += f", accuracy {100 * logs['eval_accuracy'].dropna().iloc[-1]:.2f}%"
        lines.append(line)
    if unigram_entropy is not None:
        lines.append(f"  {'unigram entropy':<17}{unigram_entropy:.4f} nats (knowing only how frequent tokens are)")
    return lines


def _perplexity(loss: float) -> str:
    # Past this a perplexity says nothing, and exp would overflow further up.
    return f"{math.exp(loss):,.2f}" if loss < 30 else "above 1e13" if loss >= 30 else "not a number"


def _neurons(history: RecyclingHistory) -> list[str]:
    neurons, phases = history.stats["neurons"], history.stats["phases"]
    total, ever = neurons["total"], neurons["ever_recycled"]
    if not phases:
        return [f"Neurons: {total:,} in {len(history.blocks)} feed-forward blocks, none recycled"]
    lines = [
        f"Neurons: {total:,} in {len(history.blocks)} feed-forward blocks; {ever:,} recycled at least once"
        f" ({100 * ever / total:.1f}%)",
        f"  {history.stats['recycling_events']:,} recyclings in {phases:,} selection phases; now"
        f" {neurons['fading_in']:,} fading in, {neurons['immune']:,} immune",
        "  times recycled   neurons",
    ]
    counts = np.concatenate(list(history.counts.values()))
    groups = group_times(counts, _TIMES)
    numbers = [group.count(counts) for group in groups]
    for group, number in zip(groups, numbers, strict=True):
        # At least one mark where there is a neuron: a rare group must not look like an empty one.
        bar = "█" * math.ceil(_BAR * number / max(numbers))
        lines.append(f"  {group.label:>14}   {number:>9,}   {bar}".rstrip())
    return lines


def _pruned(history: RecyclingHistory) -> list[str]:
    pruned, total = history.stats["neurons"]["pruned"], history.stats["neurons"]["total"]
    return [f"  {pruned:,} of {total:,} neurons are pruned ({100 * pruned / total:.1f}%)"] if pruned else []


def _overtrained(history: RecyclingHistory) -> list[str]:
    done = history.stats.get("overtraining", {})
    if not done.get("times"):
        return []
    extra = f"{done['batches']:,} extra batches, {done['tokens']:,} extra tokens"
    return [f"  overtrained {done['times']:,} times: {extra}"]


def _magnitudes(history: RecyclingHistory) -> list[str]:
    records = history.magnitudes
    records = records[records["quantiles"].map(len) > 0]
    blocks = [block for block in history.blocks if (records["block"] == block).any()]
    if not blocks:
        return []
    shown = blocks
    if len(blocks) > _BLOCKS:
        shown = [blocks[i] for i in np.linspace(0, len(blocks) - 1, _BLOCKS).round().astype(int)]
    steps = records["step"]
    title = f"Neuron magnitudes, step {steps.min():,} → {steps.max():,}"
    if len(shown) < len(blocks):
        title += f" ({len(shown)} of {len(blocks)} blocks)"
    names = short_names(blocks, width=22)
    lines = [f"{title:<46}{'1%':^17}{'median':^17}{'99%':^17}".rstrip()]
    for block in shown:
        mine = records[records["block"] == block].sort_values("step", kind="stable")["quantiles"]
        first, last = mine.iloc[0], mine.iloc[-1]
        cells = [f"{first[i]:>7.3g} → {last[i]:<7.3g}" for i in (QUANTILE_LEVELS.index(q) for q in (0.01, 0.5, 0.99))]
        lines.append(f"  {names[block]:<44}{''.join(cells)}".rstrip())
    return lines


def _loading(folder: str | None, auto_class: str) -> list[str]:
    if folder is None:
        return []
    return [
        "Load it with plain transformers:",
        f"  from transformers import {auto_class}",
        f"  model = {auto_class}.from_pretrained({folder!r})",
    ]


def next_steps(folder: str) -> str:
    """Commands that look further into a run, as they can be pasted where the user stands."""
    us, run = our_command(), path_word(folder)
    steps = {
        "which neurons are small, dead or alike": ["analyze", run, "--output", f"{run}/analysis"],
        "the same model without 30% of its neurons": ["shrink", run, "--fraction", "0.3", "--output", f"{run}-small"],
        "all of the run as one page": ["report", run, "--output", f"{run}/report.html"],
    }
    lines = [line for what, words in steps.items() for line in (f"  # {what}", f"  {shlex.join([us, *words])}")]
    return "\n".join(["Next:", *lines])
