"""What came out of the runs of a study."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_recycle.records.files import CONFIG_FILE
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.studies.plan import PlannedRun, Study
from hf_recycle.utils.whole_files import write_bytes

RESULT_FILE = "study_result.json"


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        tokens: of all training batches, padding included, and of overtraining; None if unknown.
        losses, evaluations: (step, loss in nats per predicted token), in order.
        settings: every argument that differs from its default.
        folder: where the run lies.
    """

    arm: str
    seed: int
    steps: int
    tokens: int | None
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]
    settings: Mapping[str, Any]
    folder: str

    @property
    def eval_loss(self) -> float:
        """The last evaluation loss."""
        return self.evaluations[-1][1]

    @cached_property
    def history(self) -> RecyclingHistory | None:
        """What happened to the neurons; None for a model without any."""
        folder = Path(self.folder)
        return RecyclingHistory.of_own_run(folder) if (folder / CONFIG_FILE).exists() else None


def collect(planned: PlannedRun, folder: Path) -> RunResult:
    """Reads a finished run and leaves `study_result.json` in its folder, which marks it as done.

    Raises:
        ValueError: the run has not been evaluated.
        Exception: what reading its files raises.
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    curves: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}}
    for row in state["log_history"]:
        for name, curve in curves.items():
            if name in row:
                curve[int(row["step"])] = float(row[name])
    if not curves["eval_loss"]:
        raise ValueError(f"{folder} has no evaluation loss: a study needs eval_strategy=steps and validation data")
    result = RunResult(
        arm=planned.arm,
        seed=planned.seed,
        steps=int(state["global_step"]),
        tokens=_tokens(folder, state),
        losses=sorted(curves["loss"].items()),
        evaluations=sorted(curves["eval_loss"].items()),
        settings=dict(planned.settings),
        folder=str(folder),
    )
    write_bytes(folder / RESULT_FILE, json.dumps(asdict(result), indent=1, default=str).encode())
    return result


def _tokens(folder: Path, state: Mapping[str, Any]) -> int | None:
    """Tokens of the whole training."""
    if not (folder / CONFIG_FILE).exists():  # a model without feed-forward neurons keeps no record of its own
        return state.get("num_input_tokens_seen") or None
    history = RecyclingHistory.of_own_run(folder)
    tokens = history.config.get("run", {}).get("tokens")
    return None if tokens is None else tokens + history.stats.get("overtraining", {}).get("tokens", 0)


def load_result(planned: PlannedRun, folder: Path) -> RunResult | None:
    """The result of a run that is done, under the arm and seed it was planned for; None if it is not done, or if its
    files are damaged: then the run goes on from its last checkpoint, which writes them anew."""
    try:
        content: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        losses, evaluations = ([(int(s), float(v)) for s, v in content[name]] for name in ("losses", "evaluations"))
        steps, tokens = content["steps"], content["tokens"]
        settings = dict(planned.settings)
        result = RunResult(planned.arm, planned.seed, steps, tokens, losses, evaluations, settings, str(folder))
        _ = result.eval_loss, result.history
    except (OSError, ValueError, TypeError, KeyError, IndexError):  # RecyclingFileError is a ValueError
        return None
    return result


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

    def missing(self) -> list[tuple[str, int]]:
        """(arm, seed) of the runs that neither finished nor failed."""
        wanted = [(arm.name, seed) for arm in self.study.arms for seed in self.study.seeds]
        return [key for key in wanted if key not in self.runs and key not in self.failures]

    def paired(self, arm: str, other: str) -> list[tuple[RunResult, RunResult]]:
        """The finished runs of two arms with the same seed."""
        return [
            (self.runs[arm, seed], self.runs[other, seed])
            for seed in self.study.seeds
            if (arm, seed) in self.runs and (other, seed) in self.runs
        ]
