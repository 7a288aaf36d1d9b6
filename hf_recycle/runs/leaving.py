"""How a process of a launch ends."""

import atexit
import os
import sys
import threading
from typing import NoReturn


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
        threading._shutdown()
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
