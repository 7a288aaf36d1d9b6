import numpy as np
import pytest

from hf_recycle.studies import statements, verdicts
from hf_recycle.studies.verdicts import (
    CANT_TELL,
    FAILS,
    HOLDS,
    MISSING,
    STATEMENTS,
    UNCLEAR,
    check,
    every_seed,
    judges_losses,
    lower,
    no_better,
)

CONTROL = {"known": [1.0, 1.1, 0.9], "known to be worse": [2.0, 2.11, 1.9]}


def verdict(name, results):
    return check(name, results)[1].verdict


@pytest.mark.parametrize("name", list(STATEMENTS))
def test_a_study_without_its_arms_has_not_measured_it(made_up, name):
    words, found = check(name, made_up({"something": [1.0, 2.0]}))
    assert words == STATEMENTS[name].__doc__.strip().splitlines()[0].rstrip(".")
    assert found.verdict == MISSING
    assert found.measured.startswith("needs the arm")


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([1.00, 1.01, 0.99], [1.50, 1.52, 1.49], HOLDS),
        ([1.50, 1.52, 1.49], [1.00, 1.01, 0.99], FAILS),
        ([1.00, 1.60, 0.90], [1.20, 1.10, 1.30], UNCLEAR),
        ([1.00], [2.00], UNCLEAR),  # one seed tells nothing
    ],
)
def test_lower_losses(made_up, one, two, expected):
    found = lower(made_up({"a": one, "b": two}), "a", "b")
    assert found.verdict == expected
    assert f"{np.mean(np.subtract(one, two)):+.4f} nats" in found.measured


def test_seeds_are_paired(made_up):
    # The seeds differ by far more than the arms, which differ by the same in each.
    found = lower(made_up({"a": [1.0, 5.001, 9.002], "b": [1.1, 5.1, 9.1]}), "a", "b")
    assert found.verdict == HOLDS
    # A seed that only one of them has finished is left out.
    found = lower(made_up({"c": [1.0, 5.001], "d": [1.1, 5.1, 0.0]}), "c", "d")
    assert "-0.0995" in found.measured


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ([1.1, 1.2, 1.15], HOLDS),  # worse
        ([0.999, 1.001, 1.0], HOLDS),  # the same, closely
        ([0.5, 0.51, 0.52], FAILS),  # better
        ([0.6, 1.4, 1.0], UNCLEAR),  # the same, but it could be anything
        ([1.1], UNCLEAR),
    ],
)
def test_no_gain(made_up, one, expected):
    assert no_better(made_up({"a": one, "b": [1.0] * len(one)}), "a", "b").verdict == expected


ABOUT_COUNTS_AND_MAGNITUDES = {
    "vicious_cycle",
    "immunity_breaks_the_cycle",
    "matched_normal_breaks_the_cycle",
    "magnitudes_grow",
    "magnitudes_form_two_groups",
    "midpoint_evens_magnitudes",
    "weight_decay_balances",
}


def test_which_statements_judge_losses():
    assert {name for name in STATEMENTS if not judges_losses(name)} == ABOUT_COUNTS_AND_MAGNITUDES


@pytest.mark.parametrize(
    ("worse", "expected"),
    [
        ([2.0, 2.11, 1.9], HOLDS),
        ([1.0, 1.1, 0.9], CANT_TELL),  # the same
        ([1.01, 1.111, 0.91], CANT_TELL),  # surely worse, by less than what counts as a gain
        ([0.0, 0.11, -0.1], CANT_TELL),  # better, which should not be
        ([2.0, 1.0, 4.0], CANT_TELL),  # by chance
        ([2.0], CANT_TELL),  # one seed
        ([float("nan")] * 3, CANT_TELL),
        (None, CANT_TELL),  # not run
    ],
)
@pytest.mark.parametrize("about", ["losses", "counts"])
def test_of_losses_nothing_is_said_unless_the_positive_control_separates(made_up, about, worse, expected):
    losses = {"baseline": [1.0] * 3, "plain": [1.1, 1.2, 1.15], "immunity-6": [1.0] * 3, "known": [1.0, 1.1, 0.9]}
    losses |= {} if worse is None else {"worse": worse}
    histories = {name: {"phases": 7, "favourites": name == "plain"} for name in ("plain", "immunity-6")}
    results = made_up(losses, histories, control=("known", "worse"))
    if about == "losses":
        assert verdict("recycling_does_not_beat_the_baseline", results) == expected
        assert verdict("matched_normal_hurts", results) == MISSING
    else:
        assert verdict("vicious_cycle", results) == HOLDS
        assert verdict("immunity_breaks_the_cycle", results) == HOLDS


def test_without_a_control_nothing_is_said_of_losses(made_up):
    results = made_up({"baseline": [1.0] * 3, "plain": [1.1, 1.2, 1.15]})
    assert verdict("recycling_does_not_beat_the_baseline", results) == CANT_TELL


def test_every_seed_needs_the_margin():
    assert every_seed([1.3, 1.4], 1.2) == HOLDS
    assert every_seed([1.3, 1.1], 1.2) == UNCLEAR
    assert every_seed([0.9, 0.8], 1.2) == FAILS
    assert every_seed([0.9, 1.3], 1.2) == UNCLEAR


def test_the_vicious_cycle_and_what_breaks_it(made_up):
    plain, spread = {"phases": 7, "favourites": True}, {"phases": 7, "favourites": False}
    results = made_up({"plain": [1.0, 1.0], "immunity-6": [1.0, 1.0]}, {"plain": plain, "immunity-6": spread})
    counts = results.of("plain")[0].history.counts
    assert max(count.max() for count in counts.values()) > 4
    assert verdict("vicious_cycle", results) == HOLDS
    assert verdict("immunity_breaks_the_cycle", results) == HOLDS
    assert verdict("matched_normal_breaks_the_cycle", results) == MISSING


def test_random_recycling_is_no_vicious_cycle(made_up):
    at_random = {"phases": 7, "favourites": False}
    results = made_up({"plain": [1.0], "matched-normal": [1.0]}, {"plain": at_random, "matched-normal": at_random})
    assert verdict("vicious_cycle", results) == UNCLEAR
    # The same draws reach as many neurons.
    assert verdict("matched_normal_breaks_the_cycle", results) == FAILS


def test_a_model_without_history_breaks_no_statement(made_up):
    results = made_up({name: [1.0, 1.1] for name in ("baseline", "plain", "immunity-6", "midpoint-1", "weight-decay")})
    for name in ("vicious_cycle", "immunity_breaks_the_cycle", "magnitudes_grow", "midpoint_evens_magnitudes"):
        assert verdict(name, results) == MISSING, name


def test_a_history_without_phases_or_magnitudes_breaks_no_statement(made_up):
    empty = {"magnitudes": False, "phases": 0}
    results = made_up({"plain": [1.0], "baseline": [1.0]}, {"plain": empty, "baseline": empty})
    assert verdict("vicious_cycle", results) == MISSING
    assert verdict("magnitudes_grow", results) == MISSING


def test_magnitudes_that_grow(made_up):
    results = made_up({"baseline": [1.0]}, {"baseline": {"phases": 5}})
    records = results.of("baseline")[0].history.magnitudes
    medians = [
        np.mean([quantiles[5] for quantiles in records[records["step"] == step]["quantiles"]])
        for step in (records["step"].min(), records["step"].max())
    ]
    found = check("magnitudes_grow", results)[1]
    assert found.verdict == HOLDS
    assert found.measured == f"median {medians[0]:.3g} → {medians[1]:.3g}"


def test_evenness_is_measured_by_quantiles(made_up, monkeypatch):
    results = made_up(
        {"baseline": [1.0, 1.0], "midpoint-1": [1.0, 1.0]}, {name: {"phases": 1} for name in ("baseline", "midpoint-1")}
    )
    assert verdict("midpoint_evens_magnitudes", results) == FAILS  # the same spread
    run = results.of("midpoint-1")[0]
    levels = statements._quantiles(run, run.history.magnitudes["step"].max())
    expected = np.mean([(row[7] - row[3]) / row[5] for row in levels])
    assert statements._spread(run) == pytest.approx(expected)
    monkeypatch.setattr(statements, "_spread", lambda run: 1.0 if run.arm == "baseline" else 0.5)
    assert verdict("midpoint_evens_magnitudes", results) == HOLDS
    monkeypatch.setattr(statements, "_spread", lambda run: 1.0 if run.arm == "baseline" else 0.95)
    assert verdict("midpoint_evens_magnitudes", results) == UNCLEAR


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"no-ff": 3.0, "ff-half": 2.5, "baseline": 2.0, "ff-double": 1.5}, HOLDS),
        ({"no-ff": 3.0, "ff-half": 2.5, "baseline": 2.6, "ff-double": 1.5}, FAILS),
        ({"no-ff": 3.0, "baseline": 2.0}, HOLDS),
        ({"baseline": 2.0}, MISSING),
    ],
)
def test_width(made_up, losses, expected):
    noise = np.array([0.0, 0.01, -0.01])
    arms = {name: list(loss + noise[[i % 3, 1, 2]]) for i, (name, loss) in enumerate(losses.items())}
    results = made_up({**arms, **CONTROL}, control=CONTROL)
    assert verdict("wider_is_better", results) == expected


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ([(1.0, 1.2, 2.0), (1.1, 1.33, 2.0), (0.9, 1.12, 1.8)], HOLDS),
        ([(1.0, 1.2, 2.0), (1.0, 1.001, 1.9), (1.0, 1.3, 2.0)], UNCLEAR),  # of one step the interval holds zero
        ([(1.0, 0.8, 2.0), (1.1, 0.89, 1.9), (1.0, 0.79, 2.0)], FAILS),
        ([(1.0, 1.03, 1.06)], HOLDS),
        ([(1.0, 1.03, 1.04)], UNCLEAR),  # one seed: both steps need a margin
        ([(1.0, 0.97, 1.5)], FAILS),
    ],
)
def test_one_shot_pruning(made_up, monkeypatch, curves, expected):
    from hf_recycle.analysis.pruning import PruneCurves
    from hf_recycle.studies import one_shot

    def measured(run):
        low, drawn, high = curves[run.seed - 1]
        losses = {"low_magnitude": low, "random": drawn, "high_magnitude": high}
        # Nothing and everything pruned must not count.
        return PruneCurves("x", "mlm", 9, (0, 0.5, 1), {name: [50, loss, -50] for name, loss in losses.items()})

    monkeypatch.setattr(one_shot, "one_shot_curves", measured)
    results = made_up({"baseline": [1.0] * len(curves), **CONTROL}, {"baseline": {}}, control=CONTROL)
    assert verdict("one_shot_pruning_order", results) == expected


def test_two_groups(made_up, monkeypatch):
    from types import SimpleNamespace

    from hf_recycle.analysis import model

    layers = {1: [True, True, False], 2: [True, True, True]}
    monkeypatch.setattr(
        model,
        "analyze",
        lambda source: SimpleNamespace(
            blocks=[SimpleNamespace(bimodal=b, dip_p=0.0 if b else 0.5) for b in layers[int(source.name[-1])]]
        ),
    )
    results = made_up({"baseline": [1.0, 1.0]}, {"baseline": {}})
    assert verdict("magnitudes_form_two_groups", results) == HOLDS  # of the last layer nothing is said
    layers[2] = [True, False, True]
    assert verdict("magnitudes_form_two_groups", results) == UNCLEAR


def test_a_check_that_breaks_costs_only_its_line(made_up, monkeypatch):
    def broken(results):
        """Something is so."""
        raise RuntimeError("no way")

    monkeypatch.setitem(verdicts.STATEMENTS._functions, "broken", broken)
    words, found = check("broken", made_up({"baseline": [1.0]}))
    assert words == "Something is so"
    assert (found.verdict, found.measured) == (MISSING, "the check failed: RuntimeError: no way")
