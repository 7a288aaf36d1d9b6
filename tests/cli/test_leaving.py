"""Processes of a launch end without what libraries do when they are taken apart."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, ctypes, sys, threading, time
from hf_recycle.train import leave

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # as a thread that outlives its library
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("work", end=" ")
if sys.argv[1] == "error":
    atexit.register(lambda: 1 / 0)
leave(int(sys.argv[2]))
"""


def leave(case: str, status: int, processes: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    words = [sys.executable, "-c", SCRIPT, case, str(status)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reaches the C library by its Linux name")
@pytest.mark.parametrize(("case", "status"), [("fine", 0), ("fine", 2), ("error", 0)])
def test_one_of_several_processes(case, status):
    ended = leave(case, status, processes=2)
    assert ended.returncode == status
    assert ended.stdout == "work thread\nexit function\n"
    assert ("ZeroDivisionError" in ended.stderr) == (case == "error")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reaches the C library by its Linux name")
def test_a_process_alone_ends_as_ever():
    ended = leave("fine", 0, processes=1)
    assert ended.stdout == "work thread\nexit function\n"
    assert ended.returncode != 0  # the abort
