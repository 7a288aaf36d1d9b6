"""The report of a study: what was measured, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jinja2
import numpy as np
import torch

from hf_recycle.files import package_version
from hf_recycle.studies.figures import FIGURES
from hf_recycle.studies.inference import PairedDifference, paired_difference
from hf_recycle.studies.results import RunResult, StudyResults
from hf_recycle.studies.statements import check

_DPI = 110


@dataclass(frozen=True)
class ArmRow:
    """A line of the report's table: losses in nats, differences from the baseline paired by seed.

    Attributes:
        at_equal_time: mean evaluation loss after the training time of the quickest arm.
    """

    arm: str
    about: str
    seeds: int
    mean: float
    spread: float | None
    difference: PairedDifference | None
    tokens: float
    seconds: float
    at_equal_time: float
    time_difference: PairedDifference | None


def arm_rows(results: StudyResults) -> list[ArmRow]:
    """One row for each arm that has a finished run."""
    arms = [arm for arm in results.study.arms if results.has(arm.name)]
    if not arms:
        return []
    seconds = min(float(np.mean([run.seconds for run in results.of(arm.name)])) for arm in arms)
    return [_row(results, arm.name, arm.about, seconds) for arm in arms]


def _row(results: StudyResults, arm: str, about: str, seconds: float) -> ArmRow:
    runs, base = results.of(arm), results.study.baseline
    losses = [run.eval_loss for run in runs]
    pairs = results.paired(arm, base) if base is not None and base != arm else []

    def difference(measure) -> PairedDifference | None:
        return paired_difference(*zip(*[map(measure, pair) for pair in pairs], strict=True)) if pairs else None

    return ArmRow(
        arm=arm,
        about=about,
        seeds=len(runs),
        mean=float(np.mean(losses)),
        spread=float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        difference=difference(lambda run: run.eval_loss),
        tokens=float(np.mean([run.tokens for run in runs])),
        seconds=float(np.mean([run.seconds for run in runs])),
        at_equal_time=float(np.mean([run.eval_loss_at(seconds) for run in runs])),
        time_difference=difference(lambda run: run.eval_loss_at(seconds)),
    )


def write_report(results: StudyResults, folder: Path, command: str, jobs: int) -> list[Path]:
    """Writes `report.md`, `report.html` and `figures/` into a folder; returns the two pages."""
    figures = _draw(results, folder / "figures")
    rows = arm_rows(results)
    content = {
        "study": results.study,
        "rows": rows,
        "equal_seconds": min((row.seconds for row in rows), default=0),
        "statements": [check(name, results) for name in results.study.statements],
        "failures": sorted(results.failures.items()),
        "command": command,
        "machine": _machine(jobs),
        "settings": _common_settings(results),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_recycle.studies", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name,
    )
    environment.filters |= {"difference": _difference, "cell": _cell}
    markdown, page = folder / "report.md", folder / "report.html"
    linked = [(title, f"figures/{path.name}") for title, path in figures]
    inlined = [(title, _data_uri(path)) for title, path in figures]
    markdown.write_text(environment.get_template("report.md.jinja").render(content, figures=linked))
    page.write_text(environment.get_template("report.html.jinja").render(content, figures=inlined))
    return [markdown, page]


def _draw(results: StudyResults, folder: Path) -> list[tuple[str, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    drawn = []
    for number, plan in enumerate(results.study.figures, start=1):
        figure = FIGURES[plan.kind](results, plan)
        if figure is not None:
            path = folder / f"{number:02d}-{plan.kind.replace('_', '-')}.png"
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
            drawn.append((plan.title, path))
    return drawn


def _common_settings(results: StudyResults) -> list[tuple[str, object]]:
    """The arguments that all runs share."""
    planned = [run.settings for run in results.study.runs()]
    shared = set(planned[0].items()) if all(_hashable(run) for run in planned) else set()
    for run in planned[1:]:
        shared &= set(run.items())
    return sorted(shared)


def _hashable(settings) -> bool:
    return not any(isinstance(value, list | dict) for value in settings.values())


def _machine(jobs: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cores()} CPU cores"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    at_a_time = "one run at a time" if jobs == 1 else f"{jobs} runs at a time"
    return f"{device}, {at_a_time}; hf_recycle {package_version()}, {libraries}, Python {platform.python_version()}"


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _difference(found: PairedDifference | None) -> str:
    if found is None:
        return "–"
    interval = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{interval}"


def _cell(text: object) -> str:
    """A text that stays in its cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def summary_table(rows: Sequence[ArmRow]) -> str:
    """The main numbers for a terminal."""
    width = max((len(row.arm) for row in rows), default=3)
    lines = [f"{'arm':<{width}}  seeds  evaluation loss      difference from the baseline"]
    for row in rows:
        spread = f" ± {row.spread:.4f}" if row.spread is not None else ""
        lines.append(
            f"{row.arm:<{width}}  {row.seeds:>5}  {f'{row.mean:.4f}{spread}':<19}  {_difference(row.difference)}"
        )
    return "\n".join(lines)


__all__ = ["ArmRow", "RunResult", "arm_rows", "summary_table", "write_report"]
