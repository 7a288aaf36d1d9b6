"""Resuming from the Hub: one commit for all processes, and a state that refers to nothing of another machine."""

import os
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.engines.replica_checksum import from_main_process
from hf_recycle.hub.address import HubAddress, is_address
from hf_recycle.hub.pull.names import refuse_pickled
from hf_recycle.hub.pull.pull import is_pulled, plan
from hf_recycle.hub.pull.trust import check_checkpoint

logger = logging.get_logger(__name__)


def local_checkpoint(source: Any, args: RecyclingArguments) -> Any:
    """Where to resume from: an address on the Hub becomes a checked folder of its cache, all else stays as it is.

    The main process settles the commit and the files, then the first process of each node downloads and the others
    take what it has downloaded. A folder that already lies in the cache is held to the same: the path of it is no way
    round the checks.

    Args:
        source: what `Trainer.train` takes as `resume_from_checkpoint`.
        args: the token is `hub_token`, the trust `trust_pickled_checkpoint`.

    Raises:
        UserError: on every process.
    """
    if is_address(source):
        agreed = from_main_process(lambda: plan(HubAddress.parse(source), args.hub_token, _trust(args)), args.device)
        with args.main_process_first(local=True, desc="downloading the checkpoint"):
            folder = agreed.fetch(args.hub_token)
        logger.warning(f"Resuming from {agreed.address}, downloaded to {folder}")
        return str(folder)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)  # the Trainer notes it in its state, which is written as JSON
    found = get_last_checkpoint(args.output_dir) if source is True and Path(args.output_dir).is_dir() else source
    if isinstance(found, str) and Path(found).is_dir() and is_pulled(found):
        if not _trust(args):
            refuse_pickled(found, _names(Path(found)), "whoever wrote it")
        check_checkpoint(Path(found), found)
    return source


def _names(folder: Path) -> list[str]:
    """What lies in a folder at any depth; folders with a slash, because a link to one is not entered."""
    names = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        names += [(inside / name).as_posix() for name in files]
        names += [f"{(inside / name).as_posix()}/" for name in folders]
    return names


def _trust(args: RecyclingArguments) -> bool:
    return getattr(args, "trust_pickled_checkpoint", False)


def forget_foreign_best(state: TrainerState, folder: str, output_dir: str) -> None:
    """Takes from the state of a pulled checkpoint the path of the best checkpoint, which is one of another machine.

    The best checkpoint is then the pulled one if it is the best, the one in `output_dir` if it is there, and else
    unknown until a better one is saved.
    """
    state.best_model_checkpoint = None
    if state.best_global_step is None:
        return
    here = Path(output_dir, f"checkpoint-{state.best_global_step}")
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = folder
    elif here.is_dir():
        state.best_model_checkpoint = str(here)
    else:
        logger.warning(
            f"The best checkpoint so far, of step {state.best_global_step}, was not pulled: load_best_model_at_end "
            "takes the best one from here on, if one is better."
        )
