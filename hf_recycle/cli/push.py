"""`hf-recycle push FOLDER REPO`: publish a run, a checkpoint, or what could not be published during training."""

import argparse
import sys
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, print_result
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser

HELP = "Publish a run or a checkpoint on the Hugging Face Hub."

_DESCRIPTION = """\
Publish a run's output folder, or one of its checkpoints, in one commit: the model, the recycling files, the card and
its figures, and nothing else that lies there. Tokens, local paths and names of this machine are left out. Logs in with
the token of `hf auth login` or HF_TOKEN; the repository is made if it is not there."""
_STEP = "step"


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument(
        "folder", metavar="FOLDER", help="An output folder, a checkpoint, or a folder under unpublished/."
    )
    parser.add_argument("repo", metavar="REPO", help="user/name, organisation/name, or a name in your own namespace.")
    parser.add_argument("--revision", metavar="BRANCH", help="The branch to push to, made if it is not there.")
    parser.add_argument("--private", action="store_true", help="If the repository is made, make it private.")
    parser.add_argument(
        "--tag", nargs="?", const=_STEP, metavar="NAME", help="Tag the commit; without a name as step-N."
    )
    parser.add_argument("--commit_message", metavar="TEXT", help="Default: step, loss and share of neurons recycled.")
    parser.add_argument(
        "--resumable",
        action="store_true",
        help="Also publish what training goes on from: the whole (newest) checkpoint, as last-checkpoint/.",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    # Imported late: --help needs neither torch nor the network.
    from hf_recycle.hub.push.publisher import Publisher
    from hf_recycle.hub.push.repository import Repository

    push = _push_of(options)
    folder = push.folder.parent.parent if push.staged else push.folder
    repository = Repository(
        push.repo_id, private=push.private, revision=push.revision, output_dir=folder, named_by="REPO"
    )
    publisher = Publisher(repository, says_failures=False)
    future = publisher.submit(push)
    try:
        publisher.finish()
    except KeyboardInterrupt:
        print("\nstopped; nothing was published, or all of it", file=sys.stderr)
        raise
    for failed in publisher.unpublished:
        if isinstance(failed.error, UserError):
            raise failed.error
        print(f"error: {push.folder} was not published to {push.repo_id}: {failed.reason}", file=sys.stderr)
        return 1
    commit = future.result()
    url = commit.commit_url if commit else None
    done = f"published {push.folder} as {url}" if url else f"{push.folder} has been published meanwhile"
    print_result(options, {"folder": str(push.folder), "commit": url}, lambda: done)
    return 0


def _push_of(options: argparse.Namespace):
    from hf_recycle.hub.push.commit_message import commit_message, step_of
    from hf_recycle.hub.push.job import JOB_FILE, Push

    folder = _model_folder(Path(options.folder), options.resumable)
    step = step_of(folder)
    tag = options.tag
    if tag == _STEP:
        if step is None:
            raise UserError(f"--tag needs a name: nothing in {folder} says which step the model is of.")
        tag = f"step-{step}"
    message, description = commit_message(folder, options.commit_message)
    checkpoint = "last-checkpoint" if options.resumable else None
    if (folder / JOB_FILE).is_file():
        push = Push.load(folder)
        wanted = {"revision": options.revision, "tag": tag, "checkpoint": checkpoint, "private": options.private}
        if options.commit_message:
            wanted |= {"message": message, "description": description}
        return push.to(repo_id=options.repo, **{name: value for name, value in wanted.items() if value})
    private = True if options.private else None
    return Push(folder, options.repo, message, description, options.revision, checkpoint, tag, private=private)


def _model_folder(folder: Path, resumable: bool) -> Path:
    """The folder to publish: `folder` itself, or the newest checkpoint in it."""
    from transformers.trainer_utils import get_last_checkpoint

    from hf_recycle.hub.push.layout import has_weights

    if not folder.is_dir():
        raise UserError(f"FOLDER={str(folder)!r} does not exist; name an output folder or a checkpoint of a run.")
    is_checkpoint = (folder / "trainer_state.json").is_file() and (folder / "scheduler.pt").is_file()
    if has_weights(folder) and (is_checkpoint or not resumable):
        return folder
    newest = get_last_checkpoint(str(folder))
    if newest is None or not has_weights(Path(newest)):
        what = "checkpoint to resume from" if resumable and has_weights(folder) else "weights of a model"
        raise UserError(f"FOLDER={str(folder)!r} holds no {what}; name an output folder or a checkpoint of a run.")
    print(f"publishing the newest checkpoint in it, {newest}", file=sys.stderr)
    return Path(newest)
