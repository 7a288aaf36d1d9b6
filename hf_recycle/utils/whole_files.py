"""Files that are whole or absent, and on the disk before anybody relies on them."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def put(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary file, then puts it at `path` at once and for good; returns `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the rename itself is lost in a power cut unless the folder is flushed too
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file that is whole or absent; returns its path."""
    return put(path, lambda temporary: temporary.write_bytes(data))


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk.

    A folder is flushed where that is possible: Windows opens none, and some network file systems flush none.

    Raises:
        OSError: a file's content could not be written.
    """
    if path.is_dir():
        with contextlib.suppress(OSError):
            _flush(path, os.O_RDONLY)
    else:
        # Windows flushes only what is open for writing.
        _flush(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def sync_tree(folder: Path) -> None:
    """Flushes a folder with everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
