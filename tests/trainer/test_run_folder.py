"""Checkpoints appear whole, disappear whole, and go in the order of their steps."""

import itertools
import os
import shutil
import time
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint

from hf_recycle.checkpoints import run_folder
from hf_recycle.checkpoints.run_folder import (
    checkpoint_folder,
    install,
    keep_only,
    remove,
    rotate,
    staging_folder,
    tidy,
)

WHOLE = ("model", "optimizer", "state")


def write(folder: Path, content: str = "") -> Path:
    folder.mkdir(parents=True)
    for name in WHOLE:
        (folder / name).write_text(content)
    return folder


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("there", "limit", "newest", "best", "left"),
    [
        ([4, 8, 12], 2, 12, None, [8, 12]),
        ([4, 8, 12], None, 12, None, [4, 8, 12]),
        ([4, 8, 12], 0, 12, None, [4, 8, 12]),
        ([4, 8, 12], 1, 12, 4, [4, 12]),  # the best stays, and the newest, which resuming needs
        ([4, 8, 12], 2, 12, 4, [4, 12]),
        ([4, 8, 12], 5, 12, None, [4, 8, 12]),
        ([9, 10, 100], 2, 100, None, [10, 100]),
        ([4, 5, 8, 12], 2, 5, None, [4, 5]),  # resumed from 4: what was trained past it is replaced by this run
        ([4, 5, 8, 12], 3, 5, 12, [4, 5, 12]),
    ],
)
def test_rotation_goes_by_steps_whatever_the_clock_says(there, limit, newest, best, left, tmp_path):
    for age, step in enumerate(there):
        when = time.time() - 1000 * age  # the latest step looks oldest
        os.utime(write(checkpoint_folder(tmp_path, step)), (when, when))
    rotate(tmp_path, limit, newest, str(checkpoint_folder(tmp_path, best)) if best else None)
    assert steps(tmp_path) == left


def test_only_checkpoints_of_the_run_are_deleted(tmp_path):
    elsewhere, run = write(tmp_path / "cache" / "checkpoint-3"), tmp_path / "run"
    for name in ("checkpoint-3", "checkpoint-4", "checkpoint-final", "checkpoint-4-old", "mine"):
        write(run / name)
    keep_only(run, elsewhere)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4-old", "checkpoint-final", "mine"]
    assert elsewhere.is_dir()


class Killed(BaseException):
    pass


def killed_at(monkeypatch, moment: int):
    """Dies at the n-th change of the disk, counted over renames and deletions of single files."""
    calls = itertools.count(1)

    def deadly(function):
        def wrapped(*args, **kwargs):
            if next(calls) == moment:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    def rmtree(folder, ignore_errors=False):
        for path in sorted(Path(folder).glob("*")):
            unlink(path)
        Path(folder).rmdir() if Path(folder).exists() else None

    unlink = deadly(Path.unlink)
    monkeypatch.setattr(run_folder.os, "replace", deadly(os.replace))
    monkeypatch.setattr(run_folder.shutil, "rmtree", rmtree)


@pytest.mark.parametrize("moment", range(1, 12))
@pytest.mark.parametrize("act", ["save", "save again", "delete"])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(act, moment, tmp_path, monkeypatch):
    older, newer = checkpoint_folder(tmp_path, 8), checkpoint_folder(tmp_path, 12)
    write(older, "old")
    if act != "save":
        write(newer, "old")
    if act != "delete":
        write(staging_folder(newer), "new")
    with monkeypatch.context() as patched:
        killed_at(patched, moment)
        try:
            remove(newer) if act == "delete" else install(newer)
            done = True
        except Killed:
            done = False

    def all_whole():
        return all(sorted(path.name for path in folder.iterdir()) == sorted(WHOLE) for folder in tmp_path.glob("ch*"))

    assert all_whole()
    tidy(tmp_path)
    assert all_whole()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("checkpoint-")]
    # Nothing is lost that was whole: at worst what was being saved, if nothing lay under its name.
    last = Path(get_last_checkpoint(tmp_path))
    if act == "save again":
        assert last == newer
    if act != "delete" and done:
        assert (last / "state").read_text() == "new"


def test_nothing_is_deleted_for_a_best_checkpoint_that_is_gone(tmp_path):
    for step in (4, 8):
        write(checkpoint_folder(tmp_path, step))
    keep_only(tmp_path, checkpoint_folder(tmp_path, 2))
    assert steps(tmp_path) == [4, 8]
    keep_only(tmp_path, checkpoint_folder(tmp_path, 4))
    assert steps(tmp_path) == [4]


def test_what_the_system_does_not_let_go_of_stays_whole(tmp_path, monkeypatch):
    checkpoint = write(checkpoint_folder(tmp_path, 4))

    def busy(*_):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(run_folder.os, "replace", busy)
    remove(checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(WHOLE)
    shutil.rmtree(checkpoint)
