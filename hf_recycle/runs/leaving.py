"""How a process of a launch ends."""

import os
import sys
from typing import NoReturn

from hf_recycle.internals.of_python import finish


def leave(status: int) -> NoReturn:
    """Ends the process with `status`; one of several that trained together without taking the interpreter apart.

    All that Python does at the end is done: threads are waited for, exit functions are called, files are flushed. What
    comes then frees libraries while threads of theirs still run (those of process groups, of readers), and now and then
    one of these aborts a process whose work is done, which the launcher takes for a failed training. multiprocessing
    ends its processes in the same way.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    try:
        finish()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
