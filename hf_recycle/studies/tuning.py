"""Tuning: each arm's best settings, on seeds of their own, before the arms are compared."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_recycle.studies.measures import values_of
from hf_recycle.studies.plan import Arm, Study
from hf_recycle.studies.results import StudyResults


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one arm.

    Attributes:
        tried: settings as text -> mean of the study's measure over the tuning seeds; infinite where a run diverged.
        chosen: the settings of the lowest.
        at_edge: those of the chosen settings that are the first or last of at least three values tried, beyond which
            there may be better ones.
    """

    arm: str
    tried: Mapping[str, float]
    chosen: Mapping[str, Any]
    at_edge: tuple[str, ...]


def tuning_study(study: Study) -> Study:
    """The runs of tuning, as a study with an arm for each arm and point of the grid."""
    assert study.tuning is not None
    arms = [
        Arm(f"{arm.name}-tuning{number}", arm.recipes, {**arm.settings, **point})
        for arm in study.arms
        for number, point in enumerate(_points(study, arm))
    ]
    return replace(study, arms=tuple(arms), seeds=study.tuning.seeds, tuning=None, figures=())


def choose(study: Study, found: StudyResults) -> tuple[Study, list[Tuned]]:
    """The study with each arm's best settings, and how they were found.

    Args:
        found: of `tuning_study`, with a result or a failure for each run.
    """
    assert study.tuning is not None
    tuned, arms = [], []
    for arm in study.arms:
        points = list(_points(study, arm))
        values = [_mean(found, f"{arm.name}-tuning{number}") for number in range(len(points))]
        best = points[int(np.argmin(values))]
        edges = {name: (tried[0], tried[-1]) for name, tried in study.tuning.grid.items() if len(tried) > 2}
        at_edge = tuple(name for name, value in best.items() if value in edges.get(name, ()))
        words = [", ".join(f"{name}={value}" for name, value in point.items()) for point in points]
        tuned.append(Tuned(arm.name, dict(zip(words, values, strict=True)), best, at_edge))
        arms.append(replace(arm, settings={**arm.settings, **best}))
    return replace(study, arms=tuple(arms)), tuned


def _points(study: Study, arm: Arm) -> list[dict[str, Any]]:
    """The points of the grid, of the settings that are open in this arm."""
    assert study.tuning is not None
    fixed = {*arm.settings, *study.overrides}
    open_ = {name: tried for name, tried in study.tuning.grid.items() if name not in fixed}
    return [dict(zip(open_, values, strict=True)) for values in itertools.product(*open_.values())]


def _mean(found: StudyResults, arm: str) -> float:
    """Infinite if a run failed or diverged. The mean, because a setting at which one seed gets stuck is a bad one."""
    values = values_of(found, arm)
    if len(values) < len(found.study.seeds) or not np.isfinite(values).all():
        return float("inf")
    return float(np.mean(values))
