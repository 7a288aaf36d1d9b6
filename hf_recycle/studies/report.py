"""The report of a study: what was measured, as Markdown and as one self-contained HTML page."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jinja2
import numpy as np
import torch

from hf_recycle import __version__
from hf_recycle.card.zoom import Zoom, inline_svg
from hf_recycle.plots.style import save
from hf_recycle.studies.figures import FIGURES
from hf_recycle.studies.inference import DIVERGED, PairedDifference, paired_difference
from hf_recycle.studies.key import code_version
from hf_recycle.studies.measures import measure_words, values_of
from hf_recycle.studies.published import PUBLISHED_LOSS_DIFFERENCES, counts_rows
from hf_recycle.studies.results import StudyResults
from hf_recycle.studies.tuning import Tuned
from hf_recycle.studies.verdicts import HOLDS, MISSING, check, check_claim, control, difference
from hf_recycle.utils.whole_files import write_bytes


@dataclass(frozen=True)
class ArmRow:
    """A line of the report's table: the study's measure in nats, differences from the baseline paired by seed.

    Attributes:
        values: seed -> the measure of its run; not finite if it diverged.
        median: over seeds; of infinite losses too.
        spread: standard deviation over seeds; None with one seed, or if a run diverged.
        tokens: mean over runs; None if one is unknown.
    """

    arm: str
    about: str
    values: dict[int, float]
    median: float
    spread: float | None
    difference: PairedDifference | None
    tokens: float | None

    @property
    def diverged(self) -> int:
        """How many runs did."""
        return sum(not math.isfinite(value) for value in self.values.values())


def arm_rows(results: StudyResults) -> list[ArmRow]:
    """One row for each arm that has a finished run."""
    return [_row(results, arm.name, arm.about) for arm in results.study.arms if results.has(arm.name)]


def _row(results: StudyResults, arm: str, about: str) -> ArmRow:
    runs, base, values = results.of(arm), results.study.baseline, values_of(results, arm)
    known = [run.tokens for run in runs if run.tokens is not None]
    return ArmRow(
        arm=arm,
        about=about,
        values={run.seed: value for run, value in zip(runs, values, strict=True)},
        median=float(np.median(values)),
        spread=float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else None,
        difference=difference(results, arm, base) if base is not None and base != arm else None,
        tokens=float(np.mean(known)) if len(known) == len(runs) else None,
    )


def removal_rows(results: StudyResults) -> list[tuple[str, list[PairedDifference]]]:
    """What each criterion with each fold costs at each share: the loss above that of the whole models, cheapest first
    at the largest share."""
    removal = results.study.removal
    if removal is None or not results.has(removal.arm):
        return []
    # Late: this brings models and the Trainer, which reading a study can do without.
    from hf_recycle.studies.one_shot import removal_curves

    curves = [removal_curves(run, removal).losses for run in results.of(removal.arm)]
    rows = [
        (name, [paired_difference(losses, whole) for losses in rest])
        for name in curves[0]
        for whole, *rest in [list(zip(*(seed[name] for seed in curves), strict=True))]
    ]
    return sorted(rows, key=lambda row: row[1][-1].mean)


def count_tests(results: StudyResults) -> dict[str, int]:
    """How often the report asks whether something is so, by what it asks."""
    differences = [row.difference for row in arm_rows(results)]
    verdicts = [check(name, results)[1] for name in results.study.statements]
    return {
        "differences from the baseline": sum(each is not None and each.low is not None for each in differences),
        "shares taken away": sum(len(found) for _, found in removal_rows(results)),
        "claims": sum(check_claim(claim, results).verdict != MISSING for claim in results.study.claims),
        "statements": sum(verdict.verdict != MISSING for verdict in verdicts),
        "positive control": int(control(results).verdict != MISSING),
    }


def write_report(
    results: StudyResults, folder: Path, command: str, jobs: int, tuned: Sequence[Tuned] = ()
) -> list[Path]:
    """Writes `report.md`, `report.html` and `figures/` into a folder; returns the two pages."""
    figures, not_drawn = _draw(results, folder / "figures")
    rows = arm_rows(results)
    content = {
        "study": results.study,
        "rows": rows,
        "measure": measure_words(results),
        "steps": sorted({run.steps for run in results.runs.values()}),
        "tuned": tuned,
        "claims": [(claim.says, check_claim(claim, results)) for claim in results.study.claims],
        "tests": count_tests(results),
        "control": control(results),
        "control_separates": control(results).verdict == HOLDS,
        "published": [
            (row, PUBLISHED_LOSS_DIFFERENCES[row.arm])
            for row in rows
            if row.arm in PUBLISHED_LOSS_DIFFERENCES and row.difference is not None  # another study's baseline
        ],
        "removal": removal_rows(results),
        "counts": counts_rows(results),
        "statements": [check(name, results) for name in results.study.statements],
        "failures": sorted(results.failures.items()),
        "missing": results.missing(),
        "not_drawn": not_drawn,
        "command": command,
        "machine": _machine(jobs),
        "zoom": Zoom(),
        **_settings(results),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_recycle.studies", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name,
    )
    environment.filters |= {"difference": _difference, "number": _number, "cell": _cell, "shares": _shares}
    markdown, page = folder / "report.md", folder / "report.html"
    linked = [(title, f"figures/{path.name}") for title, path in figures]
    inlined = [(title, inline_svg(path.with_suffix(".svg").read_bytes())) for title, path in figures]
    for path, template, drawn in ((markdown, "report.md.jinja", linked), (page, "report.html.jinja", inlined)):
        write_bytes(path, environment.get_template(template).render(content, figures=drawn).encode("utf-8"))
    return [markdown, page]


def _draw(results: StudyResults, folder: Path) -> tuple[list[tuple[str, Path]], list[tuple[str, str]]]:
    """The figures drawn, each as a PNG beside an SVG, and those that can't be, with the reason: one that fails costs
    the report nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        old.unlink()
    drawn, not_drawn = [], []
    for number, plan in enumerate(results.study.figures, start=1):
        name = f"{number:02d}-{plan.kind.replace('_', '-')}"
        try:
            figure = FIGURES[plan.kind](results, plan)
            if figure is None:
                not_drawn.append((plan.title, "no finished run has what it shows"))
                continue
            path, _ = save(figure, folder / name)
        except Exception as error:
            not_drawn.append((plan.title, f"{type(error).__name__}: {error}"))
        else:
            drawn.append((plan.title, path))
    return drawn, not_drawn


def _settings(results: StudyResults) -> dict[str, object]:
    """The arguments that all runs share, and for each arm those that are its own."""
    planned = results.study.changed(seeds=results.study.seeds[:1]).runs()
    first = planned[0].settings
    shared = {
        name: value
        for name, value in first.items()
        if name != "seed" and all(name in run.settings and run.settings[name] == value for run in planned)
    }
    own = [
        (run.arm, ", ".join(f"{n}={v}" for n, v in run.settings.items() if n not in shared and n != "seed"))
        for run in planned
    ]
    return {"settings": sorted(shared.items()), "own_settings": own}


def _machine(jobs: int) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} CPU cores"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    at_a_time = "one run at a time" if jobs == 1 else f"{jobs} runs at a time"
    code = f"hf_recycle {__version__} (sources {code_version()})"
    return f"{device}, {at_a_time}; {code}, {libraries}, Python {platform.python_version()}"


def _difference(found: PairedDifference | None) -> str:
    if found is None:
        return "–"
    if found.diverged:
        return DIVERGED
    interval = "" if found.low is None else f" [{found.low:+z.4f}, {found.high:+z.4f}]"
    return f"{found.mean:+z.4f}{interval}"


def _number(value: float | None, digits: int = 4, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    return f"{value / scale:,.{digits}f}" if math.isfinite(value) else DIVERGED


def _shares(shares: dict[int, float] | None) -> str:
    """Times recycled and how many percent of the neurons were."""
    return "–" if shares is None else ", ".join(f"{times}: {100 * share:.1f}%" for times, share in shares.items())


def _cell(text: object) -> str:
    """A text that stays in its cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def summary_table(rows: Sequence[ArmRow]) -> str:
    """The main numbers for a terminal."""
    width = max((len(row.arm) for row in rows), default=3)
    lines = [f"{'arm':<{width}}  seeds  median loss          difference from the baseline"]
    for row in rows:
        spread = f" ± {row.spread:.4f}" if row.spread is not None else ""
        lines.append(
            f"{row.arm:<{width}}  {len(row.values):>5}  {_number(row.median) + spread:<19}  "
            f"{_difference(row.difference)}"
        )
    return "\n".join(lines)
