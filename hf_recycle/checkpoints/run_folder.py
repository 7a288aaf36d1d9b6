"""The checkpoints in a run's folder: each appears whole, disappears whole, and is never half of either.

What is on its way in or out bears a name that nothing takes for a checkpoint (`get_last_checkpoint` either).
"""

import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_recycle.records.file_set import remove_half_saved
from hf_recycle.utils.whole_files import sync

logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]{{1,18}})")
_PENDING, _REPLACED, _DELETED = "tmp-", "-replaced", "-deleted"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def staging_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return checkpoint.with_name(f"{_PENDING}{checkpoint.name}")


def step_of_name(folder: Path) -> int | None:
    """The step that the name of a checkpoint's folder tells."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def install(checkpoint: Path) -> None:
    """Gives what lies in the staging folder its name, in place of a checkpoint that was saved at that step before."""
    replaced = _set_aside(checkpoint, _REPLACED) if checkpoint.exists() else None
    os.replace(staging_folder(checkpoint), checkpoint)
    sync(checkpoint.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, or leaves it whole where the system doesn't let go of it."""
    try:
        aside = _set_aside(checkpoint, _DELETED)
    except OSError as error:  # on Windows while somebody reads it
        logger.warning(f"{checkpoint} can't be deleted now ({error.strerror or error}).")
        return
    sync(checkpoint.parent)
    shutil.rmtree(aside, ignore_errors=True)


def rotate(run: Path, limit: int | None, newest: int, best: str | None) -> None:
    """Deletes checkpoints until `limit` are left, never the newest and the best.

    First go those past the newest, of a training that this one has taken the place of by resuming from an earlier
    step; then the others, by their steps.

    Args:
        limit: None or 0 keeps all.
        newest: the step of the checkpoint that was just saved.
        best: the path of the best one.
    """
    if not limit or limit < 0:
        return
    found = _checkpoints(run)
    kept = {newest, step_of_name(Path(best)) if best else None}.intersection(found)
    candidates = sorted(found.keys() - kept, key=lambda step: (step <= newest, step))
    for step in candidates[: max(0, len(found) - max(limit, len(kept)))]:
        remove(found[step])


def keep_only(run: Path, checkpoint: Path) -> None:
    """Deletes all checkpoints of a run but one, which may lie elsewhere; none if that one is gone."""
    for other in _checkpoints(run).values() if checkpoint.exists() else ():
        if not other.samefile(checkpoint):
            remove(other)


def tidy(run: Path) -> None:
    """Removes what a killed process left half written or half deleted, and finishes what it was about to replace.

    To be called by whoever alone works in the folder.
    """
    for replaced in run.glob(f"{_PENDING}{PREFIX_CHECKPOINT_DIR}-*{_REPLACED}"):
        checkpoint = run / replaced.name.removeprefix(_PENDING).removesuffix(_REPLACED)
        if not checkpoint.exists():
            whole = staging_folder(checkpoint)
            os.replace(whole if whole.exists() else replaced, checkpoint)
    for leftover in run.glob(f"{_PENDING}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_half_saved(run)


def _checkpoints(run: Path) -> dict[int, Path]:
    steps = {path: step_of_name(path) for path in run.iterdir() if path.is_dir()}
    return {step: path for path, step in steps.items() if step is not None}


def _set_aside(checkpoint: Path, why: str) -> Path:
    aside = checkpoint.with_name(f"{_PENDING}{checkpoint.name}{why}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside
