"""A run is done by one process at a time, also where several studies share it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_recycle.utils.locks import FileLock

_LOCK_FILE, _PAUSE = ".study.lock", 0.5


@contextmanager
def run_lock(folder: Path, stopping: threading.Event, waiting: Callable[[], None]) -> Iterator[int | None]:
    """Within it this process alone works in the folder of a run.

    A training process that inherits the lock goes on to hold it should this process be killed, so that nobody else
    starts the same run meanwhile.

    Args:
        stopping: ends the wait for another study, without the lock.
        waiting: called once if another study has it.

    Yields:
        The number of the file to pass on; None where files can't be locked.
    """
    lock = FileLock(folder / _LOCK_FILE, inherited=True)
    try:
        said = False
        while not stopping.is_set() and not lock.take():
            if not said:
                waiting()
            said = True
            stopping.wait(_PAUSE)
        yield lock.number
    finally:
        lock.release()
