"""What a study says of a statement, and how that is decided: by intervals over seeds, and margins."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hf_recycle.studies.inference import DIVERGED, PairedDifference, paired_difference
from hf_recycle.studies.measures import pairs_of
from hf_recycle.studies.plan import Claim
from hf_recycle.studies.results import StudyResults
from hf_recycle.utils.registry import Registry

HOLDS, FAILS, UNCLEAR, MISSING = "holds", "does not hold", "not shown at this scale", "not measured"
CANT_TELL = "can't tell"

LOSS_MARGIN = 0.02
"""Nats: a gain that is smaller is none, where a statement says that something brings none."""


@dataclass(frozen=True)
class Verdict:
    """What a study says of one statement.

    Attributes:
        verdict: HOLDS and FAILS where the measurement says so, UNCLEAR where it can't tell, MISSING where the study
            lacks an arm; CANT_TELL of losses where the positive control does not separate.
        measured: the numbers, or what is lacking.
    """

    verdict: str
    measured: str


Check = Callable[[StudyResults], Verdict]

STATEMENTS: Registry[Check] = Registry("statement", "hf_recycle.studies.statements")
"""Checks by name; the first line of a check's docstring is the statement."""


_OF_LOSSES = "judges_losses"


def of_losses(function: Check) -> Check:
    """Decorator of a check that judges losses: nothing can be told of them unless the positive control separates."""

    @functools.wraps(function)
    def judged(results: StudyResults) -> Verdict:
        found = function(results)
        told = found.verdict == MISSING or control(results).verdict == HOLDS
        return found if told else Verdict(CANT_TELL, found.measured)

    setattr(judged, _OF_LOSSES, True)
    return judged


def judges_losses(name: str) -> bool:
    """Whether the statement of this name is about losses."""
    return getattr(STATEMENTS[name], _OF_LOSSES, False)


def control(results: StudyResults) -> Verdict:
    """Whether the positive control separates: HOLDS if the whole interval lies beyond `LOSS_MARGIN`. Less would leave
    nothing that a method could gain or lose."""
    pair = results.study.control
    if pair is None:
        return Verdict(MISSING, "the study names no positive control")
    found = difference(results, pair.lower, pair.higher)
    if found is None:
        return needs(pair.lower, pair.higher)
    separates = found.high is not None and found.high < -LOSS_MARGIN
    return Verdict(HOLDS if separates else FAILS, told(pair.lower, pair.higher, found))


def check(name: str, results: StudyResults) -> tuple[str, Verdict]:
    """A statement in words, and its verdict. A check that fails costs the report nothing but its line."""
    function = STATEMENTS[name]
    words = (function.__doc__ or name).strip().splitlines()[0].rstrip(".")
    try:
        return words, function(results)
    except Exception as error:
        return words, Verdict(MISSING, f"the check failed: {type(error).__name__}: {error}")


def check_claim(claim: Claim, results: StudyResults) -> Verdict:
    """Whether a claim of the study's file holds: it judges losses."""
    return of_losses(lambda results: lower(results, claim.lower, claim.than))(results)


def lower(results: StudyResults, one: str, two: str) -> Verdict:
    """Whether arm `one` ends lower: the 95% interval of the paired difference must say so."""
    found = difference(results, one, two)
    if found is None:
        return needs(one, two)
    return Verdict(below_zero(found), told(one, two, found))


def no_better(results: StudyResults, one: str, two: str) -> Verdict:
    """Whether arm `one` fails to beat `two`: the interval must leave no room for a gain of `LOSS_MARGIN` or more."""
    found = difference(results, one, two)
    if found is None:
        return needs(one, two)
    if below_zero(found) == HOLDS:
        return Verdict(FAILS, told(one, two, found))
    holds = found.low is not None and found.low > -LOSS_MARGIN
    return Verdict(HOLDS if holds else UNCLEAR, told(one, two, found))


def difference(results: StudyResults, one: str, two: str) -> PairedDifference | None:
    """The study's measure of `one` minus `two`, paired by seed; None without a common seed."""
    pairs = pairs_of(results, one, two)
    return paired_difference(*zip(*pairs, strict=True)) if pairs else None


def below_zero(found: PairedDifference) -> str:
    """HOLDS if the interval lies below zero, FAILS if above, UNCLEAR if it holds zero or there is none."""
    if found.low is None or found.high is None:
        return UNCLEAR
    return HOLDS if found.high < 0 else FAILS if found.low > 0 else UNCLEAR


def told(one: str, two: str, found: PairedDifference) -> str:
    if found.diverged:
        return f"{one} minus {two}: {DIVERGED}"
    interval = "one seed" if found.low is None else f"95% interval {found.low:+z.4f} to {found.high:+z.4f}"
    p = "" if found.p is None else f", p {found.p:.3f}"
    return f"{one} minus {two}: {found.mean:+z.4f} nats ({interval}{p})"


def needs(*arms: str, what: str = "") -> Verdict:
    """The verdict where arms are missing, or lack `what`."""
    named = f"the arm{'s' * (len(arms) > 1)} {' and '.join(arms)}"
    return Verdict(MISSING, f"needs {named}" + (f" with {what}" if what else ""))


def every_seed(ratios: Iterable[float], margin: float) -> str:
    """Of ratios that a statement says are large, one for each seed: HOLDS if all exceed `margin`, FAILS if none exceeds
    1, UNCLEAR otherwise."""
    found = list(ratios)
    if all(ratio > margin for ratio in found):
        return HOLDS
    return FAILS if all(ratio <= 1 for ratio in found) else UNCLEAR


def first_present(results: StudyResults, names: Sequence[str]) -> str:
    """The first of the arms that has a finished run; if none has, the first."""
    return next((name for name in names if results.has(name)), names[0])
