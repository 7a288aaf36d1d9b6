"""`hf-recycle study`: a set of experiments over seeds, and their report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_recycle.cli.common import add_json_argument, no_progress_bars, print_result
from hf_recycle.errors import UserError
from hf_recycle.runs.run_arguments import add_run_arguments
from hf_recycle.utils.command_line import Parser, completed_by

if TYPE_CHECKING:
    from hf_recycle.studies.plan import Study
    from hf_recycle.studies.results import StudyResults
    from hf_recycle.studies.runner import StudyRunner
    from hf_recycle.studies.tuning import Tuned

HELP = "Run experiments over seeds and report on them."

_DESCRIPTION = """\
Run the arms of a study over seeds and write a report. Finished runs are kept and shared between studies, so the same
command goes on where it was stopped. Any argument of hf-recycle train sets that argument for every arm.

  hf-recycle study article --seeds 1 --arms plain,immunity-6 --max_steps 500"""


def add_arguments(parser: Parser) -> None:
    from hf_recycle.studies.plan_file import study_names

    parser.description = _DESCRIPTION
    parser.usage = "hf-recycle study STUDY ... [--argument VALUE ...]"
    studies = parser.add_argument(
        "studies",
        nargs="+",
        metavar="STUDY",
        help=f"Files, or names of packaged studies ({', '.join(study_names())}).",
    )
    completed_by(studies, lambda prefix: study_names())
    parser.add_argument("--scale", help="Recipe of recipes/scale/ to use instead of the study's own.")
    parser.add_argument("--seeds", help="A number of seeds, or a list such as 4,5,6.")
    parser.add_argument(
        "--arms",
        help="Only these arms (and the baseline), separated by commas; without the arms of its positive control a "
        "study says nothing of losses.",
    )
    parser.add_argument(
        "--jobs", type=int, help="Runs at a time; by default one for each GPU, or for each CPU core up to 2."
    )
    parser.add_argument(
        "--output", default="runs/studies", metavar="DIR", help="Folder of runs and reports (default: %(default)s)."
    )
    parser.add_argument("--report_only", action="store_true", help="Train nothing; report on what is done.")
    add_json_argument(parser)
    add_run_arguments(parser, shown=False)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except KeyboardInterrupt:
        command = shlex.join(["hf-recycle", "study", *options.words])
        print(f"\nstopped; finished runs are kept, go on with: {command}", file=sys.stderr)
        raise


def _run(options: argparse.Namespace) -> int:
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"jobs={options.jobs} must be at least 1")
    from hf_recycle.runs.parse import run_flags
    from hf_recycle.studies.plan_file import check_settings, find_study, load_study, parse_seeds

    # As in a recipe, so that equal runs have equal keys: 100 steps, not 100.0.
    given = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in run_flags(options).items()}
    overrides = check_settings("command line", given)
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
    check_runs(studies)
    done = [_study(study, options) for study in studies]
    if options.json:
        print_result(options, {"studies": [found for _, found in done if found is not None]}, str)
    return max(status for status, _ in done)


def check_runs(studies: Sequence[Study]) -> None:
    """Reads the arguments of every arm as a run would, so that a mistake in the last one is found now.

    Raises:
        UserError: as a run would, with the study and the arm.
    """
    import tempfile

    import yaml

    from hf_recycle.runs.parse import parse_run
    from hf_recycle.studies.tuning import tuning_study

    with tempfile.TemporaryDirectory() as folder:
        for study in studies:
            study = study if study.tuning is None else tuning_study(study)
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


def _study(study: Study, options: argparse.Namespace) -> tuple[int, dict[str, Any] | None]:
    """Tunes the arms of one study, runs them and reports on them.

    Returns:
        The exit status, and what --json prints; None if there is nothing to report on.
    """
    from hf_recycle.studies.report import arm_rows, summary_table, write_report
    from hf_recycle.studies.runner import StudyRunner
    from hf_recycle.studies.tuning import choose, tuning_study
    from hf_recycle.studies.verdicts import HOLDS, control

    no_progress_bars()
    output = Path(options.output)
    jobs, devices = _places(options.jobs)
    told = sys.stderr if options.json else sys.stdout
    say = (lambda line: None) if options.quiet else partial(print, file=told, flush=True)
    runner = StudyRunner(output / "runs", jobs, devices, say)
    tuned: list[Tuned] = []
    if study.tuning is not None:
        found = _results(tuning_study(study), runner, options.report_only, say)
        if found.missing():
            print(f"{study.title}: tuning is not finished; leave out --report_only to go on with it", file=sys.stderr)
            return 1, None
        study, tuned = choose(study, found)
    outcome = _results(study, runner, options.report_only, say)
    failures = outcome.failures
    for (arm, seed), words in failures.items():
        print(f"failed: {arm}, seed {seed}: {words}", file=sys.stderr)
    if not outcome.runs:
        print(f"{study.title}: no run is finished", file=sys.stderr)
        return 1, None
    command = shlex.join(["hf-recycle", "study", *options.words])
    pages = write_report(outcome, output / study.name, command, jobs, tuned)
    if not options.json:
        print(summary_table(arm_rows(outcome)))
        if study.control is not None and control(outcome).verdict != HOLDS:
            print(f"positive control does not separate, so of losses nothing can be told: {control(outcome).measured}")
        print(f"report: {pages[0]} and {pages[1]}")
    return int(bool(failures)), _found(outcome, tuned, pages) if options.json else None


def _found(outcome: StudyResults, tuned: Sequence[Tuned], pages: Sequence[Path]) -> dict[str, Any]:
    """What the report says, as numbers and verdicts."""
    from hf_recycle.studies.report import arm_rows, removal_rows
    from hf_recycle.studies.verdicts import check, check_claim, control

    study = outcome.study
    shares = study.removal.shares if study.removal else ()
    said = [(claim.says, check_claim(claim, outcome)) for claim in study.claims]
    said += [check(name, outcome) for name in study.statements]
    return {
        "study": study.name,
        "measure": study.measure,
        "arms": [asdict(row) for row in arm_rows(outcome)],
        "removal": [
            {"by": name, "costs": [{"share": share, **asdict(cost)} for share, cost in zip(shares, costs, strict=True)]}
            for name, costs in removal_rows(outcome)
        ],
        "control": vars(control(outcome)),
        "verdicts": [{"says": says, **vars(verdict)} for says, verdict in said],
        "tuned": [asdict(each) for each in tuned],
        "failures": [{"arm": arm, "seed": seed, "said": words} for (arm, seed), words in outcome.failures.items()],
        "missing": [{"arm": arm, "seed": seed} for arm, seed in outcome.missing()],
        "report": [str(page) for page in pages],
    }


def _results(study: Study, runner: StudyRunner, report_only: bool, say: Callable[[str], None]) -> StudyResults:
    """Does the runs of a study that are not done yet, or with `report_only` none of them."""
    from hf_recycle.studies.results import StudyResults, load_result

    planned = study.runs()
    if report_only:
        found = {(run.arm, run.seed): load_result(run, runner.folder_of(run)) for run in planned}
        return StudyResults(study, {key: result for key, result in found.items() if result is not None}, {})
    say(f"{study.title}: {len(planned)} run{'s' * (len(planned) > 1)}, {runner.jobs} at a time")
    return StudyResults(study, *runner.run(planned))


def _places(jobs: int | None) -> tuple[int, list[str]]:
    """How many runs at a time, and the devices they take turns on."""
    import torch

    gpus = torch.cuda.device_count()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",") if gpus else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs or gpus or min(2, cores), devices
