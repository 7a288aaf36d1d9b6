"""A run is done by one process at a time, also where several studies share it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows; there two studies must not share an output folder
    fcntl = None

_LOCK_FILE, _PAUSE = ".study.lock", 0.5


@contextmanager
def run_lock(folder: Path, stopping: threading.Event, waiting: Callable[[], None]) -> Iterator[int | None]:
    """Within it this process alone works in the folder of a run.

    The lock belongs to the open file: a training process that inherits its number goes on to hold it should this
    process be killed, so that nobody else starts the same run meanwhile.

    Args:
        stopping: ends the wait for another study, without the lock.
        waiting: called once if another study has it.

    Yields:
        The file's number to pass on; None where files can't be locked.
    """
    if fcntl is None:
        yield None
        return
    with (folder / _LOCK_FILE).open("ab") as file:
        said = False
        while not stopping.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not said:
                    waiting()
                said = True
                stopping.wait(_PAUSE)
        yield file.fileno()
