"""Which rows are measured, what is skipped, and what a run says."""

import json

import pytest

from benchmarks import costs, data_path, runner, steps
from benchmarks.__main__ import main
from benchmarks.contestant import Turn
from benchmarks.match import WARM_UP
from benchmarks.pairs import estimate
from benchmarks.row import FAILED, NOT_JUDGED, SKIPPED, Bench, Effort, Measured, NotMeasured, Row, Target
from benchmarks.shapes import TINY
from benchmarks.switch import is_on
from benchmarks.table import as_json, markdown, verdict
from hf_recycle.errors import UserError

EFFORT = Effort(rounds=4, quick=False)
ROW = Row("one", "something", Target(1.5, True))


def turns(seconds, losses=None, peak=100):
    losses = losses or [5.0] * (WARM_UP + len(seconds))
    taken = [0.0] * WARM_UP + list(seconds)
    return [Turn(second, 0.0, loss, peak) for second, loss in zip(taken, losses, strict=True)]


def stand_in(monkeypatch, **seconds):
    """Lets `hold_match` answer with steps of these seconds, on a machine that need not be measured."""
    monkeypatch.setattr(steps, "_reach", lambda shape, seconds: "")
    monkeypatch.setattr(steps, "hold_match", lambda contestants, rounds: {c.name: seconds[c.name] for c in contestants})


def test_speed_is_the_median_of_paired_ratios_and_the_warm_up_does_not_count(monkeypatch):
    match = {
        "stock": turns([2.0, 4.0, 6.0, 8.0], peak=200 * 2**20),
        "no method": turns([1.0, 1.0, 1.0, 1.0], peak=90 * 2**20),
        "everything": turns([1.0, 1.0, 4.0, 8.0], peak=100 * 2**20),
    }
    stand_in(monkeypatch, **match)
    speed, memory = steps.against_stock(TINY, EFFORT)
    assert speed.value.median == pytest.approx(1.75)  # of 2, 4, 1.5 and 1
    assert (speed.value.low, speed.value.high) == (1.0, 4.0)
    assert memory.value.median == pytest.approx(0.5)


def test_other_losses_are_refused(monkeypatch):
    losses = [5.0, 5.0, 5.0, 5.1, 5.0, 5.0]
    stand_in(monkeypatch, stock=turns([1] * 4), everything=turns([1] * 4), **{"no method": turns([1] * 4, losses)})
    with pytest.raises(UserError, match="differ by 2"):
        steps.against_stock(TINY, EFFORT)


def test_a_cost_compares_steps_with_and_without_and_is_spread_over_the_steps_it_is_for(monkeypatch):
    # The machine grows slower from step to step; each pair is of a step with the method and one without.
    taken = [(1.5 if is_on(WARM_UP + 1 + number) else 1.0) * 1.01 ** (number // 2) for number in range(24)]
    monkeypatch.setattr(costs, "hold_match", lambda contestants, rounds: {contestants[0].name: turns(taken[:rounds])})
    found = costs.costs_of_methods(TINY, EFFORT)
    medians = {name: each.value.median for name, each in found.items()}
    assert medians == pytest.approx({"recycling": 0.005, "smooth": 0.5, "midpoint": 0.5, "magnitudes": 0.005})
    assert {name: each.value.pairs for name, each in found.items()} == {
        "recycling": 2, "smooth": 12, "midpoint": 12, "magnitudes": 2
    }  # fmt: skip


def test_a_wait_that_comes_rarely_counts_by_its_time(monkeypatch):
    taken = [Turn(2.0, 1.5 if number == 9 else 0.02, 5.0, None) for number in range(WARM_UP + 10)]
    monkeypatch.setattr(data_path, "hold_match", lambda contestants, rounds: {"loading": taken})
    (bench,) = data_path.BENCHES
    found = bench.run(EFFORT)["data"].value
    assert (found.low, found.high) == pytest.approx((1 - 1.58 / 10, 1 - 0.1 / 10))


def test_what_is_too_large_for_the_machine_is_skipped_by_name(monkeypatch):
    bench = Bench((ROW,), lambda effort: {"one": Measured(estimate([1.6]))}, memory=1e15)
    monkeypatch.setattr(runner, "BENCHES", (bench,))
    ((row, found),) = runner.run_rows(["one"], EFFORT, lambda line: None)
    assert row is ROW
    assert verdict(row, found, EFFORT) == SKIPPED
    assert "needs 1000000 GB of memory" in found.reason
    ((_, found),) = runner.run_rows(["one"], Effort(4, quick=True), lambda line: None)
    assert isinstance(found, Measured)  # small sizes fit


def test_a_bench_that_fails_leaves_the_others_alone(monkeypatch):
    def fail(effort):
        raise UserError("the training 'stock' failed: out of memory")

    other = Row("two", "something else", Target(1, True))
    benches = (Bench((ROW,), fail, 0), Bench((other,), lambda effort: {"two": Measured(estimate([2.0]))}, 0))
    monkeypatch.setattr(runner, "BENCHES", benches)
    results = list(runner.run_rows(["one", "two"], EFFORT, lambda line: None))
    assert [verdict(*result, EFFORT) for result in results] == [FAILED, "met"]
    page = markdown(results, {}, "python -m benchmarks", EFFORT)
    assert "out of memory" in page
    assert json.loads(json.dumps(as_json(results, {}, "", EFFORT)))["rows"][0]["verdict"] == FAILED


def test_quick_runs_are_not_judged():
    assert verdict(ROW, Measured(estimate([9.0])), Effort(2, quick=True)) == NOT_JUDGED
    for quick in (True, False):
        page = markdown([(ROW, Measured(estimate([9.0])))], {}, "python -m benchmarks", Effort(2, quick))
        assert ("A quick run" in page) is quick


def test_rows_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bench = Bench((ROW,), lambda effort: {}, memory=0, gpu=True)
    monkeypatch.setattr(runner, "BENCHES", (bench,))
    ((_, found),) = runner.run_rows(["one"], EFFORT, lambda line: None)
    assert found == NotMeasured("needs a GPU")


def test_names_of_rows_are_unique():
    names = [row.name for row in runner.all_rows()]
    assert len(set(names)) == len(names) > 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stepp"], "row 'stepp' is unknown"),
        (["step", "--rounds", "1"], "rounds=1 must be at least 2"),
        (["step", "--json", "nowhere/bench.json"], "no folder 'nowhere'"),
        (["--round", "3"], "unknown argument --round"),
    ],
)
def test_bad_words_are_told_before_anything_is_measured(words, says, monkeypatch, capsys):
    monkeypatch.setattr(runner, "BENCHES", tuple(Bench(bench.rows, None, 0) for bench in runner.BENCHES))
    assert main([*words]) == 2
    assert says in capsys.readouterr().err


def test_the_list_of_rows(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(row.name in listed and str(row.target) in listed for row in runner.all_rows())
