"""Statements of the article, each checked against what a study measured.

To add one, write a function here and decorate it; a study names it under `statements`. Arms are spoken of by the names
that they have in `recipes/studies/article.yaml`. A check that judges losses is decorated with `of_losses` too.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import QUANTILE_LEVELS
from hf_recycle.studies.inference import paired_difference
from hf_recycle.studies.measures import values_of
from hf_recycle.studies.results import RunResult, StudyResults
from hf_recycle.studies.verdicts import (
    FAILS,
    HOLDS,
    LOSS_MARGIN,
    STATEMENTS,
    UNCLEAR,
    Verdict,
    below_zero,
    difference,
    every_seed,
    first_present,
    lower,
    needs,
    no_better,
    of_losses,
)

_IMMUNITIES = ("immunity-6", "immunity-2", "immunity-9")
_RECORDED = "magnitude_steps"

# ---- The vicious cycle ----


@STATEMENTS.register
def vicious_cycle(results: StudyResults) -> Verdict:
    """Plain recycling reinitialises the same small subset of neurons over and over."""
    counts = [_counts(run) for run in results.of("plain") if _recycled(run)]
    if not counts:
        return needs("plain", what="recycling")
    times = [count[count > 0].mean() for count in counts]
    shares = [count.sum() / len(count) for count in counts]
    # Neurons drawn at random each time would be hit a Poisson-like number of times.
    drawn = [share / (1 - np.exp(-share)) for share in shares]
    measured = f"a recycled neuron was recycled {_list(times)} times on average; drawn at random, {_list(drawn)}"
    return Verdict(every_seed(np.divide(times, drawn), margin=2), measured)


@STATEMENTS.register
def immunity_breaks_the_cycle(results: StudyResults) -> Verdict:
    """Immunity makes recycling reach more neurons."""
    return _reaches_more(results, first_present(results, _IMMUNITIES))


@STATEMENTS.register
def matched_normal_breaks_the_cycle(results: StudyResults) -> Verdict:
    """Reinitialising from the current weights' distribution makes recycling reach more neurons."""
    return _reaches_more(results, "matched-normal")


# ---- Losses ----


@STATEMENTS.register
@of_losses
def recycling_does_not_beat_the_baseline(results: StudyResults) -> Verdict:
    """Plain recycling brings no gain over ordinary training."""
    return no_better(results, "plain", "baseline")


@STATEMENTS.register
@of_losses
def immunity_hurts(results: StudyResults) -> Verdict:
    """Many rounds of immunity raise the loss, as good neurons are recycled."""
    return lower(results, "baseline", first_present(results, ("immunity-9", "immunity-6", "immunity-2")))


@STATEMENTS.register
@of_losses
def matched_normal_hurts(results: StudyResults) -> Verdict:
    """Reinitialising from the current weights' distribution raises the loss."""
    return lower(results, "baseline", "matched-normal")


@STATEMENTS.register
@of_losses
def copying_does_not_help(results: StudyResults) -> Verdict:
    """Copying neurons with noise does not beat the baseline."""
    return no_better(results, first_present(results, ("copy-noise-05pct", "copy-noise-01pct")), "baseline")


@STATEMENTS.register
@of_losses
def smooth_does_not_beat_the_baseline(results: StudyResults) -> Verdict:
    """Smooth recycling does not beat the baseline."""
    return no_better(results, first_present(results, ("smooth-1pct", "smooth-01pct", "smooth-10pct")), "baseline")


@STATEMENTS.register
@of_losses
def midpoint_does_not_help(results: StudyResults) -> Verdict:
    """The midpoint loss does not improve the model."""
    return no_better(results, first_present(results, ("midpoint-1", "midpoint-1e-3", "midpoint-1e-7")), "baseline")


@STATEMENTS.register
@of_losses
def wider_is_better(results: StudyResults) -> Verdict:
    """The loss falls as the feed-forward layer grows."""
    names = [name for name in ("no-ff", "ff-quarter", "ff-half", "baseline", "ff-double") if results.has(name)]
    found = [difference(results, wide, narrow) for narrow, wide in itertools.pairwise(names)]
    steps = [step for step in found if step is not None]
    if not steps or len(steps) < len(found):
        return needs("baseline", "ff-half")
    means = {name: float(np.mean(values_of(results, name))) for name in names}
    measured = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
    verdicts = [below_zero(step) for step in steps]
    return Verdict(FAILS if FAILS in verdicts else UNCLEAR if UNCLEAR in verdicts else HOLDS, measured)


# ---- Pruning ----


@STATEMENTS.register
@of_losses
def no_ff_beats_pruned_to_nothing(results: StudyResults) -> Verdict:
    """A model without feed-forward layer ends better than one that is pruned to nothing."""
    return lower(results, "no-ff", "prune-low")


@STATEMENTS.register
@of_losses
def low_magnitude_prunes_best(results: StudyResults) -> Verdict:
    """Gradually pruning small neurons costs less than pruning large ones."""
    return lower(results, "prune-low", "prune-high")


@STATEMENTS.register
@of_losses
def one_shot_pruning_order(results: StudyResults) -> Verdict:
    """Of a trained model, small neurons are pruned at the least cost, random ones at more, large ones at the most."""
    # Late: this brings models and the Trainer, which reading a study can do without.
    from hf_recycle.studies.one_shot import one_shot_curves

    curves = [one_shot_curves(run) for run in results.of("baseline") if run.history is not None]
    if not curves:
        return needs("baseline")
    # Of nothing and of everything pruned, no criterion can tell.
    means = np.array(
        [
            [np.mean(curve.losses[name][1:-1]) for name in ("low_magnitude", "random", "high_magnitude")]
            for curve in curves
        ]
    )
    measured = "mean loss over partly pruned models, low / random / high magnitude first: "
    measured += "; ".join(" / ".join(f"{loss:.3f}" for loss in seed) for seed in means)
    if len(means) == 1:  # no spread to hold a step against
        steps = np.diff(means[0])
        holds, fails = bool((steps > LOSS_MARGIN).all()), bool((steps < -LOSS_MARGIN).any())
        return Verdict(HOLDS if holds else FAILS if fails else UNCLEAR, measured)
    steps = [paired_difference(smaller, larger) for smaller, larger in itertools.pairwise(means.T)]
    verdicts = [below_zero(step) for step in steps]
    return Verdict(FAILS if FAILS in verdicts else UNCLEAR if UNCLEAR in verdicts else HOLDS, measured)


# ---- Magnitudes ----


@STATEMENTS.register
def magnitudes_grow(results: StudyResults) -> Verdict:
    """Neuron magnitudes grow during training."""
    pairs = [_medians(run) for run in results.of("baseline") if _has_magnitudes(run)]
    if not pairs:
        return needs("baseline", what=_RECORDED)
    measured = "; ".join(f"median {first:.3g} → {last:.3g}" for first, last in pairs)
    return Verdict(every_seed((last / first for first, last in pairs), margin=1.1), measured)


@STATEMENTS.register
def magnitudes_form_two_groups(results: StudyResults) -> Verdict:
    """In all layers but the last, magnitudes form two groups."""
    # Late: this brings the reading of weights.
    from hf_recycle.analysis.model import analyze
    from hf_recycle.analysis.source import Source

    blocks = [analyze(Source(run.folder)).blocks for run in results.of("baseline") if run.history is not None]
    if not blocks:
        return needs("baseline")
    values = "; ".join(", ".join(f"{block.dip_p:.3f}" for block in seed) for seed in blocks)
    measured = f"p-values of one group at the end of training, by layer (Hartigan's dip test): {values}"
    # A test that rejects nothing has not shown one group either.
    return Verdict(HOLDS if all(block.bimodal for seed in blocks for block in seed[:-1] or seed) else UNCLEAR, measured)


@STATEMENTS.register
def midpoint_evens_magnitudes(results: StudyResults) -> Verdict:
    """The midpoint loss evens out magnitudes."""
    return _more_even(results, first_present(results, ("midpoint-1", "midpoint-1e-3")))


@STATEMENTS.register
def weight_decay_balances(results: StudyResults) -> Verdict:
    """Weight decay makes the distribution of magnitudes more balanced."""
    return _more_even(results, "weight-decay")


@STATEMENTS.register
@of_losses
def small_neurons_gain_from_overtraining(results: StudyResults) -> Verdict:
    """Overtraining the smallest neurons gains more than overtraining the largest."""
    return lower(results, "overtrain-smallest", "overtrain-largest")


# ---- How they are measured ----


def _history(run: RunResult) -> RecyclingHistory:
    assert run.history is not None, "asked of runs with a history only"
    return run.history


def _recycled(run: RunResult) -> bool:
    return run.history is not None and any(count.any() for count in run.history.counts.values())


def _counts(run: RunResult) -> np.ndarray:
    """How often each neuron of all layers was recycled, `(layers * d_ff,)`."""
    return np.concatenate(list(_history(run).counts.values()))


def _reaches_more(results: StudyResults, name: str) -> Verdict:
    pairs = [pair for pair in results.paired(name, "plain") if all(map(_recycled, pair))]
    if not pairs:
        return needs("plain", name, what="recycling")
    shares = [((_counts(arm) > 0).mean(), (_counts(plain) > 0).mean()) for arm, plain in pairs]
    measured = "; ".join(f"{100 * arm:.1f}% of the neurons against {100 * plain:.1f}%" for arm, plain in shares)
    return Verdict(every_seed((arm / plain for arm, plain in shares), margin=1.2), measured)


def _more_even(results: StudyResults, name: str) -> Verdict:
    pairs = [pair for pair in results.paired(name, "baseline") if all(map(_has_magnitudes, pair))]
    if not pairs:
        return needs("baseline", name, what=_RECORDED)
    spreads = [(_spread(arm), _spread(base)) for arm, base in pairs]
    measured = "; ".join(f"(90% − 10%) / median: {arm:.3f} against {base:.3f}" for arm, base in spreads)
    return Verdict(every_seed((base / arm for arm, base in spreads), margin=1.1), measured)


def _has_magnitudes(run: RunResult) -> bool:
    return run.history is not None and bool(len(run.history.magnitudes))


def _quantiles(run: RunResult, step: int) -> np.ndarray:
    """Of each layer's magnitudes at one step, `(layers, levels)`."""
    records = _history(run).magnitudes
    return np.array([values for values in records[records["step"] == step]["quantiles"] if len(values)])


def _medians(run: RunResult) -> tuple[float, float]:
    """Median magnitude when it was first and last recorded, mean over layers."""
    steps, at = _history(run).magnitudes["step"], QUANTILE_LEVELS.index(0.5)
    first, last = (float(_quantiles(run, step)[:, at].mean()) for step in (steps.min(), steps.max()))
    return first, last


def _spread(run: RunResult) -> float:
    """Distance between the 10% and 90% quantiles of the last magnitudes, in medians; mean over layers."""
    quantiles = _quantiles(run, _history(run).magnitudes["step"].max())
    low, middle, high = (quantiles[:, QUANTILE_LEVELS.index(level)] for level in (0.1, 0.5, 0.9))
    return float(((high - low) / middle).mean())


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
