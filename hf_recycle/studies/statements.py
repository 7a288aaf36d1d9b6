"""Statements of the article, each checked against what a study measured.

To add one, write a function here and decorate it; a study names it under `statements`. A verdict is one of four:
"holds" and "does not hold" where the measurement says so, "not shown at this scale" where it can't tell, "not measured"
where the study lacks an arm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_recycle.methods.registry import Registry
from hf_recycle.recorder import QUANTILE_LEVELS
from hf_recycle.studies.inference import paired_difference
from hf_recycle.studies.results import RunResult, StudyResults

HOLDS, FAILS, UNCLEAR, MISSING = "holds", "does not hold", "not shown at this scale", "not measured"


@dataclass(frozen=True)
class Verdict:
    """What a study says of one statement: one of the four verdicts, and what was measured."""

    verdict: str
    measured: str


STATEMENTS: Registry[Callable[[StudyResults], Verdict]] = Registry("statement")
"""Checks by name; the first line of a check's docstring is the statement."""


def check(name: str, results: StudyResults) -> tuple[str, Verdict]:
    """A statement in words, and its verdict."""
    function = STATEMENTS[name]
    return (function.__doc__ or name).strip().splitlines()[0].rstrip("."), function(results)


# ---- The vicious cycle ----


@STATEMENTS.register
def vicious_cycle(results: StudyResults) -> Verdict:
    """Plain recycling reinitialises the same small subset of neurons over and over."""
    if not results.has("plain"):
        return Verdict(MISSING, "needs the arm plain")
    times, expected = [], []
    for run in results.of("plain"):
        counts = _counts(run)
        times.append(counts[counts > 0].mean())
        share = counts.sum() / len(counts)
        # Neurons drawn at random each time would be hit a Poisson-like number of times.
        expected.append(share / (1 - np.exp(-share)))
    told = f"a recycled neuron was recycled {_list(times)} times on average; drawn at random, {_list(expected)}"
    return Verdict(_all(t > 2 * e for t, e in zip(times, expected, strict=True)), told)


@STATEMENTS.register
def immunity_breaks_the_cycle(results: StudyResults) -> Verdict:
    """Immunity makes recycling reach more neurons."""
    return _reaches_more(results, _first_present(results, ("immunity-6", "immunity-2", "immunity-9")))


@STATEMENTS.register
def matched_normal_breaks_the_cycle(results: StudyResults) -> Verdict:
    """Reinitialising from the current weights' distribution makes recycling reach more neurons."""
    return _reaches_more(results, "matched-normal")


# ---- Losses ----


@STATEMENTS.register
def recycling_does_not_beat_the_baseline(results: StudyResults) -> Verdict:
    """Plain recycling shows no difference from ordinary training."""
    return _no_better(results, "plain")


@STATEMENTS.register
def immunity_hurts(results: StudyResults) -> Verdict:
    """Many rounds of immunity raise the loss, as good neurons are recycled."""
    return _lower(results, "baseline", _first_present(results, ("immunity-9", "immunity-6", "immunity-2")))


@STATEMENTS.register
def matched_normal_hurts(results: StudyResults) -> Verdict:
    """Reinitialising from the current weights' distribution raises the loss."""
    return _lower(results, "baseline", "matched-normal")


@STATEMENTS.register
def copying_does_not_help(results: StudyResults) -> Verdict:
    """Copying neurons with noise does not beat the baseline."""
    return _no_better(results, _first_present(results, ("copy-noise-05pct", "copy-noise-01pct")))


@STATEMENTS.register
def smooth_does_not_beat_the_baseline(results: StudyResults) -> Verdict:
    """Smooth recycling does not beat the baseline."""
    return _no_better(results, _first_present(results, ("smooth-1pct", "smooth-01pct", "smooth-10pct")))


@STATEMENTS.register
def midpoint_does_not_help(results: StudyResults) -> Verdict:
    """The midpoint loss does not improve the model."""
    return _no_better(results, _first_present(results, ("midpoint-1e-3", "midpoint-1", "midpoint-1e-7")))


@STATEMENTS.register
def wider_is_better(results: StudyResults) -> Verdict:
    """The loss falls as the feed-forward layer grows."""
    names = [name for name in ("no-ff", "ff-quarter", "ff-half", "baseline", "ff-double") if results.has(name)]
    if len(names) < 2:
        return Verdict(MISSING, "needs arms of two widths")
    means = [float(np.mean([run.eval_loss for run in results.of(name)])) for name in names]
    told = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means, strict=True))
    steps = [_compare(results, wide, narrow) for narrow, wide in itertools.pairwise(names)]
    if all(step == HOLDS for step in steps):
        return Verdict(HOLDS, told)
    return Verdict(FAILS if FAILS in steps else UNCLEAR, told)


# ---- Pruning ----


@STATEMENTS.register
def no_ff_beats_pruned_to_nothing(results: StudyResults) -> Verdict:
    """A model without feed-forward layer ends better than one that is pruned to nothing."""
    return _lower(results, "no-ff", "prune-low")


@STATEMENTS.register
def low_magnitude_prunes_best(results: StudyResults) -> Verdict:
    """Gradually pruning small neurons costs less than pruning large ones."""
    return _lower(results, "prune-low", "prune-high")


# ---- Magnitudes ----


@STATEMENTS.register
def magnitudes_grow(results: StudyResults) -> Verdict:
    """Neuron magnitudes grow during training."""
    pairs = [_medians(run) for run in results.of("baseline")]
    if not pairs:
        return Verdict(MISSING, "needs the arm baseline with magnitude_steps")
    told = "; ".join(f"median {first:.3g} → {last:.3g}" for first, last in pairs)
    return Verdict(_all(last > first for first, last in pairs), told)


@STATEMENTS.register
def midpoint_evens_magnitudes(results: StudyResults) -> Verdict:
    """The midpoint loss evens out magnitudes and boosts small neurons."""
    name = _first_present(results, ("midpoint-1", "midpoint-1e-3"))
    pairs = results.paired(name, "baseline")
    if not pairs:
        return Verdict(MISSING, f"needs the arms baseline and {name} with magnitude_steps")
    spreads = [(_spread(arm), _spread(base)) for arm, base in pairs]
    told = "; ".join(f"(90% − 10%) / median: {arm:.3f} against {base:.3f}" for arm, base in spreads)
    return Verdict(_all(arm < 0.8 * base for arm, base in spreads), told)


@STATEMENTS.register
def weight_decay_balances(results: StudyResults) -> Verdict:
    """Weight decay makes the distribution of magnitudes more balanced."""
    pairs = results.paired("weight-decay", "baseline")
    if not pairs:
        return Verdict(MISSING, "needs the arms baseline and weight-decay with magnitude_steps")
    spreads = [(_spread(arm), _spread(base)) for arm, base in pairs]
    told = "; ".join(f"(90% − 10%) / median: {arm:.3f} against {base:.3f}" for arm, base in spreads)
    return Verdict(_all(arm < base for arm, base in spreads), told)


@STATEMENTS.register
def small_neurons_gain_from_overtraining(results: StudyResults) -> Verdict:
    """Overtraining the smallest neurons gains more than overtraining the largest."""
    return _lower(results, "overtrain-smallest", "overtrain-largest")


# ---- How they are measured ----


def _counts(run: RunResult) -> np.ndarray:
    return np.concatenate(list(run.history.counts.values()))


def _reaches_more(results: StudyResults, name: str) -> Verdict:
    pairs = results.paired(name, "plain")
    if not pairs:
        return Verdict(MISSING, f"needs the arms plain and {name}")
    shares = [((_counts(arm) > 0).mean(), (_counts(plain) > 0).mean()) for arm, plain in pairs]
    told = "; ".join(f"{100 * arm:.1f}% of the neurons against {100 * plain:.1f}%" for arm, plain in shares)
    return Verdict(_all(arm > plain for arm, plain in shares), told)


def _compare(results: StudyResults, lower: str, higher: str) -> str:
    pairs = results.paired(lower, higher)
    found = paired_difference([one.eval_loss for one, _ in pairs], [two.eval_loss for _, two in pairs])
    if found.low is None:
        return UNCLEAR
    return HOLDS if found.high < 0 else FAILS if found.low > 0 else UNCLEAR


def _told(results: StudyResults, one: str, two: str) -> str:
    pairs = results.paired(one, two)
    found = paired_difference([a.eval_loss for a, _ in pairs], [b.eval_loss for _, b in pairs])
    interval = "one seed" if found.low is None else f"95% interval {found.low:+.4f} to {found.high:+.4f}"
    return f"evaluation loss of {one} minus {two}: {found.mean:+.4f} nats ({interval})"


def _lower(results: StudyResults, one: str, two: str) -> Verdict:
    """Whether `one` has the lower evaluation loss."""
    if not results.paired(one, two):
        return Verdict(MISSING, f"needs the arms {one} and {two}")
    return Verdict(_compare(results, one, two), _told(results, one, two))


def _no_better(results: StudyResults, name: str) -> Verdict:
    """Whether an arm fails to beat the baseline: all but an interval that lies below zero says so."""
    if not results.paired(name, "baseline"):
        return Verdict(MISSING, f"needs the arms baseline and {name}")
    beaten = _compare(results, name, "baseline") == HOLDS
    known = len(results.paired(name, "baseline")) > 1
    return Verdict(FAILS if beaten else HOLDS if known else UNCLEAR, _told(results, name, "baseline"))


def _quantiles(run: RunResult, step: int) -> list[np.ndarray]:
    records = run.history.magnitudes
    return [np.array(values) for values in records[records["step"] == step]["quantiles"] if len(values)]


def _medians(run: RunResult) -> tuple[float, float]:
    steps = run.history.magnitudes["step"]
    at = QUANTILE_LEVELS.index(0.5)
    return tuple(float(np.mean([q[at] for q in _quantiles(run, step)])) for step in (steps.min(), steps.max()))


def _spread(run: RunResult) -> float:
    low, middle, high = (QUANTILE_LEVELS.index(level) for level in (0.1, 0.5, 0.9))
    last = run.history.magnitudes["step"].max()
    return float(np.mean([(q[high] - q[low]) / q[middle] for q in _quantiles(run, last)]))


def _first_present(results: StudyResults, names: Sequence[str]) -> str:
    return next((name for name in names if results.has(name)), names[0])


def _all(conditions) -> str:
    found = list(conditions)
    return HOLDS if all(found) else FAILS if not any(found) else UNCLEAR


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
