"""The four recycling files as a set: what is read together was saved together, also while a run saves it anew."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from hf_recycle.records import files
from hf_recycle.records.file_checks import RecyclingFileError, fail
from hf_recycle.records.history_checks import check_agreement
from hf_recycle.utils.whole_files import sha256_of, sync

_SAVING = ".saving-recycling-files-"  # begins the name of a folder that is there for as long as a save goes on
_CHECKSUMS = "checksums"  # in the configuration: of the three other files
_PATIENCE, _PAUSE = 20.0, 0.02  # seconds that a reader waits for a save to end, and looks again


class FileSet(NamedTuple):
    """The content of the four files: see the writers in `files`."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    history: pa.Table
    stats: Mapping[str, Any]


def write_files(folder: str | os.PathLike[str], content: FileSet) -> None:
    """Write all four files such that a reader can tell that they belong together.

    The configuration holds the checksums of the others and comes into place last.
    """
    folder = Path(folder)
    new = folder / f"{_SAVING}{os.getpid()}"
    new.mkdir(parents=True, exist_ok=True)
    try:
        files.write_state(new, content.tensors)
        files.write_history(new, content.history)
        files.write_stats(new, content.stats)
        others = [name for name in files.RECYCLING_FILES if name != files.CONFIG_FILE]
        files.write_config(new, {**content.config, _CHECKSUMS: {name: sha256_of(new / name) for name in others}})
        for name in (*others, files.CONFIG_FILE):
            os.replace(new / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_files(
    folder: str | os.PathLike[str], find: Callable[[str | os.PathLike[str]], Path] = Path
) -> tuple[Path, FileSet]:
    """Read the four files of one save and check them, also against each other.

    A save that goes on meanwhile is waited for, and a checkpoint that was replaced is looked for again.

    Args:
        find: the folder that holds the files of `folder`.

    Returns:
        That folder, and what it holds.

    Raises:
        RecyclingFileError: a file is missing or damaged, or they are of different saves.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = Path(folder)
        before = {found: _version(found)}
        try:
            found = find(folder)
            before.setdefault(found, _version(found))
            return found, _read(found)
        except RecyclingFileError:
            # In this order: a save that ends in between has made another version.
            is_changing = _is_being_saved(found) or any(_version(place) != then for place, then in before.items())
            if not is_changing or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def remove_half_saved(folder: Path) -> None:
    """Removes what a killed process had not put into place yet."""
    for path in folder.glob(f"{_SAVING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _read(folder: Path) -> FileSet:
    config = files.read_config(folder)
    tensors = files.read_state(folder, config["blocks"])
    history, stats = files.read_history(folder, config["blocks"]), files.read_stats(folder)
    # Only now: what has its checksum after it was read had it before.
    for name, checksum in config.get(_CHECKSUMS, {}).items():
        if name in files.RECYCLING_FILES and _checksum(folder / name) != checksum:
            fail(folder / name, f"it was not saved together with {files.CONFIG_FILE}", "save both again")
    check_agreement(folder, config, tensors, history, stats)
    return FileSet(config, tensors, history, stats)


def _checksum(path: Path) -> str | None:
    with contextlib.suppress(OSError):  # it may just be replaced
        return sha256_of(path)
    return None


def _is_being_saved(folder: Path) -> bool:
    return any(folder.glob(f"{_SAVING}*"))


def _version(folder: Path) -> list[tuple[int, int] | None]:
    """Changes whenever a file of the folder appears, disappears or is replaced."""
    return [_state(path) for path in (folder, folder / files.CONFIG_FILE)]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
