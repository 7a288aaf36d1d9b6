"""The one number of a run that a study compares its arms by. To add one, write a function here and decorate it."""

from collections.abc import Callable

import numpy as np

from hf_recycle.studies.results import RunResult, StudyResults
from hf_recycle.utils.registry import Registry

MEASURES: Registry[Callable[[RunResult], float]] = Registry("measure")
"""Measures by name, in nats; the first line of a docstring says what is measured."""


@MEASURES.register
def final_eval_loss(run: RunResult) -> float:
    """evaluation loss at the end of training"""
    return run.eval_loss


@MEASURES.register
def late_tasks(run: RunResult) -> float:
    """training loss at the end of a task, mean over the last quarter of the tasks in a row"""
    ends = task_ends(run)
    return float(np.mean(ends[-max(1, len(ends) // 4) :]))


def task_ends(run: RunResult) -> list[float]:
    """Of tasks in a row, the last training loss that was logged in each.

    Raises:
        ValueError: nothing was logged where a task ends.
    """
    tasks, logged = int(run.settings.get("facts_tasks", 1)), dict(run.losses)
    ends = [run.steps * (task + 1) // tasks for task in range(tasks)]
    if missing := [step for step in ends if step not in logged]:
        raise ValueError(f"{run.folder} logged no loss at step {missing[0]}, where a task ends; change logging_steps")
    return [logged[step] for step in ends]


def values_of(results: StudyResults, arm: str) -> list[float]:
    """What the study compares its arms by, of the finished runs of an arm, in the order of seeds."""
    return [MEASURES[results.study.measure](run) for run in results.of(arm)]


def pairs_of(results: StudyResults, arm: str, other: str) -> list[tuple[float, float]]:
    """The same of two arms, for the seeds that both finished."""
    measure = MEASURES[results.study.measure]
    return [(measure(one), measure(two)) for one, two in results.paired(arm, other)]


def measure_words(results: StudyResults) -> str:
    """What the study compares its arms by, in words."""
    return (MEASURES[results.study.measure].__doc__ or results.study.measure).strip().splitlines()[0]
