"""`python -m benchmarks`: how fast training with this package is, and what each method costs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_recycle.cli.common import complain, no_progress_bars
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser
from hf_recycle.utils.suggest import nearest
from hf_recycle.utils.whole_files import write_bytes

DESCRIPTION = """\
Measure training with this package against the stock Trainer of transformers, and what each method adds to a step. What
is compared takes turns on the same machine, so that only ratios count. Close other programs first.

  python -m benchmarks                        all rows of the table (about twenty minutes on two cores)
  python -m benchmarks step memory            some of them
  python -m benchmarks --quick                small models, a minute: to see that it works, not how fast it is
"""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        _bench(_parser().parse_args(words), words)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except UserError as error:
        return complain(error)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks", description=DESCRIPTION)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="What to measure (default: everything).")
    parser.add_argument("--list", action="store_true", help="Print the rows and exit.")
    parser.add_argument("--quick", action="store_true", help="Small models and few rounds; nothing is judged.")
    parser.add_argument(
        "--rounds",
        type=int,
        help="Pairs of steps that are compared (default: 30; with quick 5); methods take 3 times or half as many, "
        "phases 4 times, probes a tenth.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write all numbers.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write the page that is printed, as Markdown.")
    return parser


def _bench(options: argparse.Namespace, words: Sequence[str]) -> None:
    from benchmarks.facts import machine_facts
    from benchmarks.row import FAILED, Effort
    from benchmarks.runner import all_rows, run_rows
    from benchmarks.table import as_json, markdown, verdict

    known = [row.name for row in all_rows()]
    for name in options.rows:
        if name not in known:
            raise UserError(f"row {name!r} is unknown; {nearest(name, known, show_all=True)}")
    if options.list:
        print("\n".join(f"{row.name:<12} {row.what} ({row.target})" for row in all_rows()))
        return
    rounds = options.rounds if options.rounds is not None else 5 if options.quick else 30
    if rounds < 2:
        raise UserError(f"rounds={rounds} must be at least 2: a spread needs two")
    for path in (options.json, options.output):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"there is no folder {str(path.parent)!r} for {path.name!r}; make it first")

    no_progress_bars()
    effort, facts = Effort(rounds, options.quick), machine_facts()
    command = " ".join(["python -m benchmarks", *words])
    results = list(run_rows(options.rows or known, effort, lambda line: print(line, file=sys.stderr)))
    page = markdown(results, facts, command, effort)
    print(page, end="")
    if options.output is not None:
        write_bytes(options.output, page.encode())
    if options.json is not None:
        text = json.dumps(as_json(results, facts, command, effort), indent=1) + "\n"
        write_bytes(options.json, text.encode())
    failed = [row.name for row, found in results if verdict(row, found, effort) == FAILED]
    if failed:
        raise UserError(f"{', '.join(failed)} failed; the page says why")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
