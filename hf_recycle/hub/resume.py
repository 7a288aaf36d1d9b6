"""Resuming from the Hub: one commit for all processes, and a state that refers to nothing of another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from hf_recycle.agreement import from_main_process
from hf_recycle.hub.address import HubAddress, is_address
from hf_recycle.hub.pull import is_pulled, plan
from hf_recycle.hub.trust import check_checkpoint

logger = logging.get_logger(__name__)


def local_checkpoint(source: Any, args: TrainingArguments) -> Any:
    """Where to resume from: an address on the Hub becomes a checked folder of its cache, all else stays as it is.

    The main process settles the commit and the files, then the first process of each node downloads and the others
    take what it has downloaded. A folder that already lies in the cache is checked as well.

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
    if isinstance(source, str) and Path(source).is_dir() and is_pulled(source):
        check_checkpoint(Path(source), source)
    return source


def _trust(args: TrainingArguments) -> bool:
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
