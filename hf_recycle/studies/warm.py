"""Processes that begin with everything imported, which takes as long as a short run: forked from one that did it once.
Where there is no fork (Windows), each imports for itself."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

_CONTEXT: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
_IMPORTED = ["hf_recycle.runs.run", "hf_recycle.trainer.trainer", "hf_recycle.plots.run", "hf_recycle.runs.summary"]


class WarmProcess:
    """A process that calls a function, in a session of its own, as a `subprocess.Popen` that is running.

    Args:
        target: a function of some module, called with `arguments`; what it returns is the exit status.
        log: a file that all it says is added to.
        environment: variables that win over those of this process.
        lock: the number of a file that it holds open as long as it lives.
    """

    def __init__(
        self,
        target: Callable[..., int],
        arguments: Sequence[Any],
        log: Path,
        environment: Mapping[str, str],
        lock: int | None,
    ):
        if hasattr(_CONTEXT, "set_forkserver_preload"):
            _CONTEXT.set_forkserver_preload(_IMPORTED)
        held = None if lock is None else _Held(lock)
        self._process = _CONTEXT.Process(target=_call, args=(target, arguments, str(log), dict(environment), held))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns as `poll` does.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def terminate(self) -> None:
        """Asks it to stop."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it with the workers it started."""
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()


class _Held:
    """The number of an open file, which the process that gets it keeps open."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(copied: Any) -> _Held:
    return _Held(copied.detach())


def _call(
    target: Callable[..., int], arguments: Sequence[Any], log: str, environment: Mapping[str, str], held: _Held | None
) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C goes to the study alone, which passes it on in an orderly way
    with open(log, "ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    if held is not None:
        os.set_inheritable(held.number, True)
    os.environ.update(environment)
    sys.exit(target(*arguments))
