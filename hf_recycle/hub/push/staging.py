"""Private copies of checkpoints that wait to be published, out of reach of rotation and of the next save.

They lie in `OUTPUT_DIR/unpublished/` and are made of hard links, which cost neither time nor room: files of a
checkpoint are written once and replaced by renaming, never changed in place. Files of an output folder are
overwritten in place by the next `save_model`, so those are copied.

Their numbers go up for as long as there are any. What has landed is noted beside them, so that nobody publishes an
older copy over it later.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from hf_recycle.hub.deadline import Deadline
from hf_recycle.hub.push.job import JOB_FILE, Push
from hf_recycle.hub.push.layout import checkpoint_files
from hf_recycle.utils.locks import FileLock

FOLDER = "unpublished"
_TEMPORARY, _NAME = "tmp-", re.compile(r"(\d+)-(.+)")
_LANDED, _LOCK = ".landed.json", ".lock"
_PAUSE = 0.2


def stage(push: Push, output_dir: Path, *, link: bool) -> Push:
    """A push of a private copy of the folder, with a note of what it is for; whole or absent.

    Args:
        link: share the files, which must then never be written in place.
    """
    parent = output_dir / FOLDER
    name = f"{_next_number(parent):04d}-{push.folder.name}"
    temporary, final = parent / f"{_TEMPORARY}{name}", parent / name
    _make(temporary)
    try:
        for relative in checkpoint_files(push.folder):
            (temporary / relative).parent.mkdir(exist_ok=True)
            _link_or_copy(push.folder / relative, temporary / relative, link)
        push.save(temporary)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return push.to(folder=final, staged=True)


def unstage(push: Push) -> None:
    """Removes what is no longer needed."""
    if not push.staged:
        return
    shutil.rmtree(push.folder, ignore_errors=True)
    parent = push.folder.parent
    if parent.is_dir() and {path.name for path in parent.iterdir()} <= {_LANDED, _LOCK}:
        for name in (_LANDED, _LOCK):
            (parent / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another copy is being made
            parent.rmdir()


def leftovers(output_dir: Path) -> list[Push]:
    """What an earlier run staged and could not publish, oldest first; what it staged only half is removed."""
    parent = output_dir / FOLDER
    if not parent.is_dir():
        return []
    for half in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(half, ignore_errors=True)
    staged = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and (path / JOB_FILE).is_file()]
    return [Push.load(path) for path in sorted(staged, key=lambda path: _number(path.name))]


# ---- What has landed ----


def note_landed(push: Push, repo_id: str) -> None:
    """Notes that a push has landed: copies made before it are older than what its branch holds."""
    parent = _copies(push)
    if parent.is_dir():
        # An output folder has no number: all copies that are there were made before it was pushed.
        number = _number(push.folder.name) if push.staged else _next_number(parent)
        branch = f"{repo_id}@{push.branch}"
        landed = _landed(parent)
        text = json.dumps(landed | {branch: max(number, landed.get(branch, 0))})
        (parent / _LANDED).write_text(text, encoding="utf-8")


def is_overtaken(push: Push, repo_id: str | None) -> bool:
    """Whether a newer push than this copy's has landed on its branch."""
    landed = _landed(push.folder.parent).get(f"{repo_id}@{push.branch}", 0) if push.staged else 0
    return _number(push.folder.name) < landed


def take_turn(push: Push, deadline: Deadline) -> FileLock:
    """Waits for the right to publish from the folder of copies, which one process has at a time and which dies with it.

    Raises:
        Overdue: another process has it for too long.
    """
    lock = FileLock(_copies(push) / _LOCK)
    while lock.path.parent.is_dir() and not lock.take():
        deadline.sleep(_PAUSE)
    return lock


def _copies(push: Push) -> Path:
    return push.folder.parent if push.staged else push.folder / FOLDER


def _landed(parent: Path) -> dict[str, int]:
    """The number of the newest copy that has landed, by repository and branch."""
    try:
        return json.loads((parent / _LANDED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _next_number(parent: Path) -> int:
    try:
        names = [path.name for path in parent.iterdir()]
    except FileNotFoundError:
        names = []
    return max([0, *map(_number, names), *_landed(parent).values()]) + 1


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _make(folder: Path) -> None:
    while not folder.is_dir():
        with contextlib.suppress(FileNotFoundError):  # the last copy has just gone, and its parent with it
            folder.mkdir(parents=True)


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            return os.link(source, target)
        except OSError:  # a file system without hard links
            pass
    shutil.copy2(source, target)
