"""Pretrain a model from recipes and arguments.

`python -m hf_recycle.train`, `accelerate launch -m hf_recycle.train` and `hf-recycle train` are the same.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hf_recycle.cli.main import main as command_line
from hf_recycle.internals.of_python import finish


def main(argv: Sequence[str] | None = None) -> int:
    """Run `RECIPE ... --argument value ...`; returns the exit status, see `hf_recycle.cli.main.main`."""
    return command_line(["train", *(sys.argv[1:] if argv is None else argv)])


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


if __name__ == "__main__":
    leave(main())
