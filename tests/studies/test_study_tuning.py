"""Tuning: which runs it needs, and what it chooses from results that are made up."""

import math
from dataclasses import replace

import pytest

from hf_recycle.studies.measures import MEASURES, task_ends
from hf_recycle.studies.plan import Arm, Study, Tuning
from hf_recycle.studies.results import RunResult, StudyResults
from hf_recycle.studies.tuning import choose, tuning_study

STUDY = Study(
    name="s",
    title="S",
    arms=(Arm("plain"), Arm("decay", settings={"weight_decay": 1.0}, about="strong")),
    seeds=(1, 2),
    settings={"learning_rate": 9.0, "max_steps": 5},
    tuning=Tuning({"learning_rate": (1, 2, 3), "weight_decay": (0, 0.1)}, seeds=(7, 8, 9)),
)


def found(study, loss):
    """Results of the tuning of a study, `loss(arm's name, settings, seed)`."""
    runs = {}
    for run in tuning_study(study).runs():
        value = loss(run.arm, run.settings, run.seed)
        if value is not None:
            runs[run.arm, run.seed] = RunResult(run.arm, run.seed, 5, None, [], [(5, value)], run.settings, "")
    return StudyResults(tuning_study(study), runs, {})


def test_every_open_setting_is_tried_on_the_tuning_seeds_alone():
    runs = tuning_study(STUDY).runs()
    assert {run.seed for run in runs} == {7, 8, 9}
    plain = [run.settings for run in runs if run.arm.startswith("plain") and run.seed == 7]
    assert [(each["learning_rate"], each["weight_decay"]) for each in plain] == [
        (rate, decay) for rate in (1, 2, 3) for decay in (0, 0.1)
    ]
    # What an arm sets itself, and what the command line sets, is not open.
    decay = [run.settings for run in runs if run.arm.startswith("decay") and run.seed == 7]
    assert [(each["learning_rate"], each["weight_decay"]) for each in decay] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    fixed = tuning_study(STUDY.changed(overrides={"learning_rate": 4, "weight_decay": 2})).runs()
    assert {(run.settings["learning_rate"], run.settings["weight_decay"]) for run in fixed} == {(4, 2)}
    assert len(fixed) == 2 * 3


def test_each_arm_gets_its_best_settings_by_the_mean():
    def loss(arm, settings, seed):
        best = 2 if arm.startswith("plain") else 3
        stuck = 5 if settings["learning_rate"] == 1 and seed == 9 else 0  # the other two seeds would choose it
        return (
            abs(settings["learning_rate"] - best)
            - 2 * (settings["learning_rate"] == 1)
            + settings["weight_decay"]
            + stuck
        )

    study, tuned = choose(STUDY, found(STUDY, loss))
    assert [dict(arm.settings) for arm in study.arms] == [
        {"learning_rate": 2, "weight_decay": 0},
        {"weight_decay": 1.0, "learning_rate": 3},
    ]
    assert [each.at_edge for each in tuned] == [(), ("learning_rate",)]
    assert tuned[0].tried["learning_rate=1, weight_decay=0.1"] == pytest.approx(-1 + 0.1 + 5 / 3)
    assert {run.seed for run in study.runs()} == {1, 2}
    assert study.arms[1].about == "strong"


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_diverged_or_failed_is_not_chosen(bad):
    def loss(arm, settings, seed):
        return bad if settings["learning_rate"] == 1 and seed == 8 else settings["learning_rate"]

    study, tuned = choose(STUDY, found(STUDY, loss))
    assert study.arms[0].settings["learning_rate"] == 2
    assert tuned[0].tried["learning_rate=1, weight_decay=0"] == math.inf


def test_measures_of_tasks_in_a_row():
    losses = [(step, float(step)) for step in range(5, 45, 5)]
    run = RunResult("a", 1, 40, None, losses, [(40, 7.0)], {"facts_tasks": 8}, "")
    assert task_ends(run) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert MEASURES["late_tasks"](run) == 37.5
    assert MEASURES["final_eval_loss"](run) == 7.0
    with pytest.raises(ValueError, match="logged no loss at step 8, where a task ends"):
        task_ends(replace(run, settings={"facts_tasks": 5}))
