"""Studies without training: results made up, histories simulated."""

import pytest
from support.simulated_runs import write_run

from hf_recycle.studies.plan import Arm, Control, FigurePlan, Study
from hf_recycle.studies.results import RunResult, StudyResults

STEPS = 100


@pytest.fixture
def made_up(tmp_path):
    """Results from `{arm: [final loss of each seed]}`; `histories` names the arms that have one, with its settings;
    `control` the arms of lower and higher loss; `more` of the study."""

    def make(losses, histories=None, failures=None, about=None, figures=(), statements=(), control=None, **more):
        runs = {}
        for arm, values in losses.items():
            for seed, loss in enumerate(values, start=1):
                folder = tmp_path / f"{arm}-{seed}"
                folder.mkdir()
                if arm in (histories or {}):
                    write_run(folder, **histories[arm])
                evaluations = [(step, loss + 100 / step - 1) for step in (20, 40, 60, 80, STEPS)]
                runs[arm, seed] = RunResult(arm, seed, STEPS, 1000, [(10, 9.0)], evaluations, {}, str(folder))
        names = [*losses, *{arm for arm, _ in failures or {}}]
        study = Study(
            name="made-up",
            title="A study & its <report>",
            arms=tuple(Arm(name, about=(about or {}).get(name, "")) for name in dict.fromkeys(names)),
            seeds=tuple(range(1, max(map(len, losses.values()), default=1) + 1)),
            baseline="baseline",
            figures=tuple(FigurePlan(kind, title, tuple(arms)) for kind, title, arms in figures),
            statements=tuple(statements),
            control=control and Control(*control),
            **more,
        )
        return StudyResults(study, runs, failures or {})

    return make
