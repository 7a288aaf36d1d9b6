"""`hf-recycle pull`: a checkpoint of the Hub, brought here and checked."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_recycle.errors import UserError
from hf_recycle.hub.address import LAST, SCHEME, HubAddress, is_address
from hf_recycle.utils.command_words import path_word

_DESCRIPTION = """\
Download a checkpoint that training can go on from, all of one commit, and check every file of it: nothing is
unpickled or executed. It goes to the Hub's cache, or as checkpoint-N into a folder of your choice."""
_EPILOG = f"""\
To resume without a copy: hf-recycle train ... --resume_from_checkpoint {SCHEME}user/repo
For the history alone (small files): RecyclingHistory.from_pretrained("user/repo")"""


def main(words: Sequence[str]) -> int:
    """Run `pull REPO ...`; returns the exit status (2 for what the user can mend)."""
    options = _parser().parse_args(words)
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        print(_pull(options))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-recycle pull",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("repo", help=f"user/repo, or {SCHEME}user/repo[@revision][/folder]")
    parser.add_argument("--folder", help=f"{LAST} or checkpoint-N; by default the newest checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit; by default the default branch")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="copy the checkpoint into this output folder")
    parser.add_argument(
        "--trust_pickled_checkpoint",
        action="store_true",
        help="also take shards of DeepSpeed or torch.distributed.checkpoint, which are unpickled when training "
        "resumes: whoever wrote them can then run any code on this machine",
    )
    return parser


def _pull(options: argparse.Namespace) -> str:
    address = _address(options)
    from hf_recycle.hub.pull.pull import plan

    settled = plan(address, trust_pickled=options.trust_pickled_checkpoint)
    folder = settled.fetch()
    if options.to is None:
        return f"{settled.address}\n{folder}\nresume with: --resume_from_checkpoint {settled.address}"
    copied = copy_checkpoint(folder, [Path(name).relative_to(folder.name) for name in settled.files], options.to)
    word = shlex.quote(path_word(options.to))
    return f"{settled.address}\n{copied}\nresume with: --output_dir {word} --resume_from_checkpoint true"


def _address(options: argparse.Namespace) -> HubAddress:
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
        raise UserError(f"{final} is there already; remove it, or name another folder after --to")
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
        raise UserError(f"--to {output_dir}: {error.strerror or error}") from error
    return final
