"""`hf-recycle report`: a run as one HTML page."""

import argparse
import os
from contextlib import suppress
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, print_result
from hf_recycle.cli.model_arguments import add_revision_argument
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser

HELP = "Draw a run, or a repository of the Hub, as one HTML page."


def add_arguments(parser: Parser) -> None:
    parser.description = (
        "Draw a run as one self-contained HTML page: results, what recycling did to each block, figures, arguments. Of "
        "a repository only small files are downloaded."
    )
    parser.add_argument(
        "run_or_repo",
        metavar="RUN_OR_REPO",
        help="A run's output folder (its newest checkpoint, unless it holds the files itself), a checkpoint, or a "
        "repository of the Hub (user/repo, or hf://user/repo[@revision][/folder]).",
    )
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="The file to write (default: %(default)s)."
    )
    add_json_argument(parser)
    add_revision_argument(parser)


def run(options: argparse.Namespace) -> int:
    _write(Path(options.output), report(options.run_or_repo, options.revision))
    print_result(options, {"output": options.output}, lambda: options.output)
    return 0


def report(run: str, revision: str | None = None) -> str:
    """The page of a folder or a repository.

    Raises:
        UserError: a revision was given for a folder.
        RecyclingFileError: nothing is found there, or a file is damaged.
    """
    # Late: a mistyped argument need not wait for matplotlib and torch.
    from hf_recycle.card.facts import facts_of
    from hf_recycle.card.html import render_report
    from hf_recycle.hub.address import locate
    from hf_recycle.plots.run import figure_pictures
    from hf_recycle.records.history import RecyclingHistory

    local = os.path.isdir(run)
    if local and revision is not None:
        raise UserError(f"revision={revision!r} is for a repository, and {run!r} is a folder here; leave it out")
    history = RecyclingHistory.from_pretrained(run, revision)
    folder = (history.folder if local else None) or _small_files(run, revision)
    facts = facts_of(history, folder, None if local else locate(run)[0])
    title = Path(run).resolve().name if local else f"{run} at {revision}" if revision else run
    return render_report(facts, figure_pictures(history, unigram_entropy=facts["unigram_entropy"]), title)


def _small_files(text: str, revision: str | None) -> Path:
    """The folder of the cache with the `config.json` of a repository, and what was measured on a text, if it was; a
    folder without them if that fails."""
    from hf_recycle.hub.address import locate
    from hf_recycle.hub.fetch import fetch_file
    from hf_recycle.records.ceiling_file import CEILING_FILE

    try:
        repo, inside, revision = locate(text, revision)
        with suppress(Exception):
            fetch_file(repo, f"{inside}{CEILING_FILE}", revision)
        return fetch_file(repo, f"{inside}config.json", revision).parent
    except Exception:  # the recycling files were there, and they are enough
        return Path(os.devnull)


def _write(path: Path, page: str) -> None:
    from hf_recycle.utils.whole_files import write_bytes

    try:
        write_bytes(path, page.encode("utf-8"))
    except OSError as error:
        raise UserError(f"output={str(path)!r} can't be written ({error.strerror}); name another file") from error
