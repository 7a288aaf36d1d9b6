"""Private copies of checkpoints that wait to be published, out of reach of rotation and of the next save.

They lie in `OUTPUT_DIR/unpublished/` and are made of hard links, which cost neither time nor room: files of a
checkpoint are written once and replaced by renaming, never changed in place. Files of an output folder are
overwritten in place by the next `save_model`, so those are copied.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from pathlib import Path

from hf_recycle.errors import UserError
from hf_recycle.hub.job import JOB_FILE, Push
from hf_recycle.hub.layout import checkpoint_files

FOLDER = "unpublished"
_TEMPORARY = "tmp-"
_LOCK = threading.Lock()  # the thread that publishes removes the parent while training makes it
_NAME = re.compile(r"(\d+)-.+")


def stage(push: Push, output_dir: Path, *, link: bool) -> Push:
    """A push of a private copy of the folder, with a note of what it is for; whole or absent.

    Args:
        link: share the files, which must then never be written in place.
    """
    parent = output_dir / FOLDER
    with _LOCK:
        parent.mkdir(parents=True, exist_ok=True)
        taken = (int(match[1]) for path in parent.iterdir() if (match := _NAME.fullmatch(path.name)))
        name = f"{max(taken, default=0) + 1:04d}-{push.folder.name}"
        temporary, final = parent / f"{_TEMPORARY}{name}", parent / name
        temporary.mkdir(exist_ok=True)
    try:
        for relative in checkpoint_files(push.folder):
            target = temporary / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(push.folder / relative, target) if link else shutil.copy2(push.folder / relative, target)
        push.save(temporary)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return push.to(folder=final, staged=True)


def unstage(push: Push) -> None:
    """Removes what is no longer needed."""
    if push.staged:
        shutil.rmtree(push.folder, ignore_errors=True)
        with _LOCK, contextlib.suppress(OSError):  # others wait there
            push.folder.parent.rmdir()


def is_older(push: Push, than: Push) -> bool:
    """Whether a private copy was made before another one, of the same run."""
    if not (push.staged and than.staged and push.folder.parent == than.folder.parent):
        return False
    return _number(push.folder) < _number(than.folder)  # numbers go up for as long as a copy is there


def set_back(push: Push, newer: Push) -> Push:
    """What is left of a private copy's push once a newer one has landed, also in the note in its folder."""
    left = push.after(newer)
    if left != push:
        with contextlib.suppress(FileNotFoundError):  # someone has removed it
            left.save(left.folder)
    return left


def set_back_older(landed: Push) -> None:
    """Sets back all private copies beside one that has landed: nobody publishes them over it later."""
    if not landed.staged or landed.late or not landed.folder.parent.is_dir():
        return
    for path in landed.folder.parent.iterdir():
        if _NAME.fullmatch(path.name) and (path / JOB_FILE).is_file():
            with contextlib.suppress(UserError):  # a damaged note publishes nothing
                push = Push.load(path)
                if is_older(push, landed) and (push.repo_id, push.branch) == (landed.repo_id, landed.branch):
                    set_back(push, landed)


def leftovers(output_dir: Path) -> list[Push]:
    """What an earlier run staged and could not publish, oldest first; what it staged only half is removed."""
    parent = output_dir / FOLDER
    if not parent.is_dir():
        return []
    for half in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(half, ignore_errors=True)
    staged = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and (path / JOB_FILE).is_file()]
    return [Push.load(path) for path in sorted(staged, key=_number)]


def _number(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
