"""What Python's standard library keeps to itself (seen in Python 3.11)."""

from __future__ import annotations

import atexit
import threading


def finish() -> None:
    """Does what the interpreter does first when it ends: waits for threads, then calls exit functions."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
