"""A lock on a folder that dies with its process, however that ends."""

import contextlib
import os
import socket
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows; there nothing is locked
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """A file that one process at a time holds. Where files can't be locked (Windows, some network file systems) or
    nothing can be written, it is as if nobody else were there.

    Args:
        path: the file, which tells who holds the lock. It goes with the lock, unless that is inherited or its process
            is killed.
        inherited: a process that is given the file's number holds the lock too; else nobody but this process does, not
            even those that are forked from it.
    """

    def __init__(self, path: Path, *, inherited: bool = False):
        self.path, self._inherited = path, inherited
        self._file: FileIO | None = None

    def take(self) -> bool:
        """Takes the lock, unless somebody else holds it; whether it was free."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(self.path, "a+")
        except OSError:
            return True
        with contextlib.suppress(OSError):  # a file system without locks, or one that is full
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            if not self._is_mine(file):  # whoever had it has just removed it
                file.close()
                return self.take()
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        if not self._inherited and hasattr(os, "register_at_fork"):
            # A data worker that outlives its killed parent by some seconds must not hold the lock.
            os.register_at_fork(after_in_child=file.close)
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            if fcntl is not None and not self._file.closed and not self._inherited and self._is_mine(self._file):
                with contextlib.suppress(OSError):
                    self.path.unlink()  # while it is held: who opened it meanwhile finds that it is another file
            self._file.close()
        self._file = None

    def _is_mine(self, file: FileIO) -> bool:
        """Whether an open file is the one at `path`."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    @property
    def number(self) -> int | None:
        """The file's number, for a process to inherit; None where files can't be locked."""
        return None if self._file is None or fcntl is None else self._file.fileno()

    def holder(self) -> str:
        """Who holds the lock or was the last to, in words; empty if the file doesn't tell."""
        try:
            return self.path.read_text(errors="replace")[:200].strip()
        except OSError:
            return ""
