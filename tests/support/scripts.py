"""Scripts in processes of their own, forked from one that has done the imports: those take longer than most scripts.

By hand, with `PYTHONPATH=tests`, they run as any other.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from unittest import mock

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["support.imported"])


def forks() -> BaseContext:
    """A context of `multiprocessing` whose processes begin with everything imported."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return _FORKS


def run_script(script: Path, *words: object, timeout: float = 550, **environment: str) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, script, *words], capture_output=True, text=True)`, in a process group of its
    own.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds; none of its processes is left.
    """
    words = [str(word) for word in (script, *words)]
    with tempfile.TemporaryDirectory() as folder:
        process = forks().Process(target=_run, args=(words, folder, os.environ | environment))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(words, timeout)
        finally:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
        texts = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    for handle, name in (1, "stdout"), (2, "stderr"):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, handle)
        os.close(file)
    os.environ.clear()
    os.environ |= environment
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
