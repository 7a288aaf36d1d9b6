"""What came out of the runs of a study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hf_recycle.history import RecyclingHistory
from hf_recycle.studies.plan import PlannedRun, Study

RESULT_FILE = "study_result.json"


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        seconds: of training, evaluations included.
        losses, evaluations: (step, loss in nats per predicted token), in order.
        tokens: input tokens of the whole training, padding included, without those of overtraining.
        folder: where the run lies.
    """

    arm: str
    seed: int
    steps: int
    seconds: float
    tokens: int
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]
    folder: str

    @property
    def eval_loss(self) -> float:
        """The last evaluation loss."""
        return self.evaluations[-1][1]

    def eval_loss_at(self, seconds: float) -> float:
        """Evaluation loss after so many seconds of training, as if steps took equally long; between two evaluations it
        is interpolated."""
        steps, values = zip(*self.evaluations, strict=True)
        return float(np.interp(seconds / self.seconds * self.steps, steps, values))

    @cached_property
    def history(self) -> RecyclingHistory | None:
        """What happened to the neurons; None for a model without any."""
        folder = Path(self.folder)
        return RecyclingHistory.from_pretrained(folder) if (folder / "recycling_config.json").exists() else None


def collect(planned: PlannedRun, folder: Path) -> RunResult:
    """Reads a finished run and leaves `study_result.json` in its folder, which marks it as done."""
    state = json.loads((folder / "trainer_state.json").read_text())
    metrics = json.loads((folder / "train_results.json").read_text())
    curves: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}}
    for row in state["log_history"]:
        for name, curve in curves.items():
            if name in row:
                curve[int(row["step"])] = float(row[name])
    result = RunResult(
        arm=planned.arm,
        seed=planned.seed,
        steps=int(state["global_step"]),
        seconds=float(metrics["train_runtime"]),
        tokens=int(state.get("num_input_tokens_seen") or 0),
        losses=sorted(curves["loss"].items()),
        evaluations=sorted(curves["eval_loss"].items()),
        folder=str(folder),
    )
    if not result.evaluations:
        raise ValueError(f"{folder} has no evaluation loss: a study needs eval_strategy=steps and validation data")
    content = {"settings": dict(planned.settings), **asdict(result)}
    temporary = folder / f".{RESULT_FILE}"
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(folder / RESULT_FILE)
    return result


def load_result(planned: PlannedRun, folder: Path) -> RunResult | None:
    """The result of a run that is done, under the arm and seed it was planned for; None if it is not done."""
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    content.pop("settings")
    pairs = {name: [(int(s), float(v)) for s, v in content[name]] for name in ("losses", "evaluations")}
    return RunResult(**content | pairs | {"arm": planned.arm, "seed": planned.seed, "folder": str(folder)})


@dataclass(frozen=True)
class StudyResults:
    """All that a study's report is made of.

    Attributes:
        runs: the finished runs, by (arm, seed).
        failures: (arm, seed) -> what the failed run said last.
    """

    study: Study
    runs: Mapping[tuple[str, int], RunResult]
    failures: Mapping[tuple[str, int], str]

    def of(self, arm: str) -> list[RunResult]:
        """The finished runs of an arm, in the order of seeds."""
        return [self.runs[arm, seed] for seed in self.study.seeds if (arm, seed) in self.runs]

    def has(self, *arms: str) -> bool:
        """Whether each of the arms has a finished run."""
        return all(self.of(arm) for arm in arms)

    def paired(self, arm: str, other: str) -> list[tuple[RunResult, RunResult]]:
        """The finished runs of two arms with the same seed."""
        return [
            (self.runs[arm, seed], self.runs[other, seed])
            for seed in self.study.seeds
            if (arm, seed) in self.runs and (other, seed) in self.runs
        ]
