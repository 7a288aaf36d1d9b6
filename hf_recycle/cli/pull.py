"""`hf-recycle pull`: a checkpoint of the Hub, brought here and checked."""

import argparse
import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, print_result
from hf_recycle.cli.model_arguments import add_revision_argument
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser
from hf_recycle.utils.command_words import path_word

HELP = "Download a checkpoint of the Hub that training can go on from."

_DESCRIPTION = """\
Download a checkpoint that training can go on from, all of one commit, and check every file of it: nothing is
unpickled or executed. It goes to the Hub's cache, or as checkpoint-N into a folder of your choice.

  hf-recycle pull user/repo --output runs/pulled                 training goes on there
  hf-recycle train demo --resume_from_checkpoint hf://user/repo  training goes on without a copy

For the history alone (small files), in Python: RecyclingHistory.from_pretrained("user/repo")"""


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("repo", metavar="REPO", help="user/repo, or hf://user/repo[@revision][/folder].")
    parser.add_argument(
        "--folder", metavar="NAME", help="last-checkpoint or checkpoint-N; by default the newest checkpoint."
    )
    add_revision_argument(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="Copy the checkpoint into this output folder.")
    parser.add_argument(
        "--trust_pickled_checkpoint",
        action="store_true",
        help="Also take shards of DeepSpeed or torch.distributed.checkpoint, which are unpickled when training "
        "resumes: whoever wrote them can then run any code on this machine.",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    from hf_recycle.hub.pull.pull import plan

    settled = plan(_address(options), trust_pickled=options.trust_pickled_checkpoint)
    folder = settled.fetch()
    resume = f"--resume_from_checkpoint {settled.address}"
    if options.output is not None:
        names = [Path(name).relative_to(folder.name) for name in settled.files]
        folder = copy_checkpoint(folder, names, options.output)
        resume = f"--output_dir {shlex.quote(path_word(options.output))} --resume_from_checkpoint true"
    found = {"address": str(settled.address), "folder": str(folder), "resume_with": resume}
    print_result(options, found, lambda: f"{settled.address}\n{folder}\nresume with: {resume}")
    return 0


def _address(options: argparse.Namespace):
    from hf_recycle.hub.address import HubAddress, is_address

    address = HubAddress.parse(options.repo) if is_address(options.repo) else HubAddress(options.repo)
    for name in ("folder", "revision"):
        given, spelled = getattr(options, name), getattr(address, name)
        if given is not None and spelled is not None and given != spelled:
            raise UserError(f"--{name} {given} contradicts {options.repo}; give one of them")
    return HubAddress(address.repo_id, options.folder or address.folder, options.revision or address.revision)


def copy_checkpoint(folder: Path, names: Iterable[Path], output_dir: Path) -> Path:
    """A copy of a pulled checkpoint's files as `checkpoint-N` of a run's folder, whole or absent.

    Raises:
        UserError: it is there already.
    """
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    final = output_dir / f"checkpoint-{state['global_step']}"
    if final.exists():
        raise UserError(f"{final} is there already; remove it, or name another folder after --output")
    partial = output_dir / f"tmp-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)  # the cache holds links
        # A path on the machine where the checkpoint was made.
        state["best_model_checkpoint"] = None
        (partial / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", "utf-8")
        partial.replace(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"output={str(output_dir)!r}: {error.strerror or error}") from error
    return final
