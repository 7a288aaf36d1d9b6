"""`hf-recycle study`: a set of experiments over seeds, and their report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hf_recycle.errors import UserError
from hf_recycle.runs.interruption import Terminated, sigterm_as_interrupt

if TYPE_CHECKING:
    from hf_recycle.studies.plan import Study

_USAGE = "hf-recycle study STUDY.yaml ... [options] [--argument value ...]"


def main(argv: Sequence[str]) -> int:
    """Run studies; returns the exit status: 0, 1 if a run failed, 2 for what the user can mend, 130 or 143 when
    stopped."""
    try:
        with sigterm_as_interrupt():
            return _run(list(argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        command = shlex.join(["hf-recycle", "study", *argv])
        print(f"\nstopped; finished runs are kept, go on with: {command}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see hf-recycle study --help")


def _parser() -> argparse.ArgumentParser:
    from hf_recycle.studies.plan_file import study_names

    parser = _Parser(
        prog="hf-recycle study",
        usage=_USAGE,
        description="Run the arms of a study over seeds and write a report. Finished runs are kept and shared between "
        "studies, so the same command goes on where it was stopped. Any argument of hf-recycle train sets that "
        "argument for every arm.",
        epilog=f"Packaged studies: {', '.join(study_names())}.",
        allow_abbrev=False,
    )
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="files, or names of packaged studies")
    parser.add_argument("--scale", help="recipe of recipes/scale/ to use instead of the study's own")
    parser.add_argument("--seeds", help="a number of seeds, or a list such as 4,5,6")
    parser.add_argument(
        "--arms",
        help="only these arms (and the baseline), separated by commas; without the "
        "arms of its positive control a study says nothing of losses",
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time; by default one for each GPU, or for each CPU core up to 2"
    )
    parser.add_argument("--output", default="runs/studies", help="folder of runs and reports (default: %(default)s)")
    parser.add_argument(
        "--report-only", "--report_only", action="store_true", help="train nothing; report on what is done"
    )
    return parser


def _run(argv: list[str]) -> int:
    options, rest = _parser().parse_known_args(argv)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} must be at least 1")
    from hf_recycle.studies.plan_file import check_settings, find_study, load_study, parse_seeds

    overrides = check_settings("command line", _settings(rest))
    studies = [
        load_study(find_study(name)).changed(
            scale=options.scale,
            seeds=None if options.seeds is None else parse_seeds(options.seeds),
            arms=None if options.arms is None else [name.strip() for name in options.arms.split(",") if name.strip()],
            overrides=overrides,
        )
        for name in options.studies
    ]
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise UserError(f"two of the studies are called {max(names, key=names.count)!r}; their reports need two names")
    _check_runs(studies)
    return max(_study(study, options, argv) for study in studies)


def _settings(words: list[str]) -> dict[str, object]:
    """`--name value` pairs as a mapping."""
    import yaml

    from hf_recycle.utils.yaml_loader import RecipeLoader

    settings: dict[str, object] = {}
    while words:
        name, equals, value = words[0].partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected {words[0]!r}; studies go before the options")
        if not equals:
            if len(words) < 2 or words[1].startswith("--"):
                raise UserError(f"{name} needs a value")
            value = words[1]
        try:
            settings[name[2:]] = yaml.load(value, RecipeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"{name} {value!r} can't be read; put it in quotes") from error
        words = words[1 if equals else 2 :]
    return settings


def _check_runs(studies: Sequence[Study]) -> None:
    """Reads the arguments of every arm as a run would, so that a mistake in the last one is found now."""
    import tempfile

    import yaml

    from hf_recycle.runs.parse import parse_run

    with tempfile.TemporaryDirectory() as folder:
        for study in studies:
            for run in study.changed(seeds=study.seeds[:1]).runs():
                path = Path(folder, "settings.yaml")
                path.write_text(yaml.safe_dump({"output_dir": folder, **run.settings}))
                where = f"study {study.name!r}, arm {run.arm!r}"
                try:
                    strategy = parse_run([str(path)]).training.eval_strategy
                except ValueError as error:
                    raise UserError(f"{where}: {str(error).replace(f'recipe {path}: ', '')}") from error
                if strategy == "no":
                    raise UserError(f"{where}: eval_strategy=no leaves nothing to compare; set it to steps")


def _study(study: Study, options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs one study and reports on it; returns the exit status."""
    from hf_recycle.cli.options import no_progress_bars
    from hf_recycle.studies.report import arm_rows, summary_table, write_report
    from hf_recycle.studies.results import StudyResults, load_result
    from hf_recycle.studies.runner import StudyRunner
    from hf_recycle.studies.verdicts import HOLDS, control

    no_progress_bars()
    output = Path(options.output)
    jobs, devices = _places(options.jobs)
    runner = StudyRunner(output / "runs", jobs, devices)
    planned = study.runs()
    if options.report_only:
        found = {(run.arm, run.seed): load_result(run, runner.folder_of(run)) for run in planned}
        results, failures = {key: result for key, result in found.items() if result is not None}, {}
    else:
        print(f"{study.title}: {len(planned)} run{'s' * (len(planned) > 1)}, {jobs} at a time")
        results, failures = runner.run(planned)
    for (arm, seed), words in failures.items():
        print(f"failed: {arm}, seed {seed}: {words}", file=sys.stderr)
    if not results:
        print(f"{study.title}: no run is finished", file=sys.stderr)
        return 1
    outcome = StudyResults(study, results, failures)
    pages = write_report(outcome, output / study.name, shlex.join(["hf-recycle", "study", *argv]), jobs)
    print(summary_table(arm_rows(outcome)))
    if study.control is not None and control(outcome).verdict != HOLDS:
        print(f"positive control does not separate, so of losses nothing can be told: {control(outcome).measured}")
    print(f"report: {pages[0]} and {pages[1]}")
    return 1 if failures else 0


def _places(jobs: int | None) -> tuple[int, list[str]]:
    """How many runs at a time, and the devices they take turns on."""
    import torch

    gpus = torch.cuda.device_count()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",") if gpus else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs or gpus or min(2, cores), devices
