"""What Python's standard library keeps to itself (seen in Python 3.11)."""

import argparse
import atexit
import threading
from collections.abc import Iterable


def finish() -> None:
    """Does what the interpreter does first when it ends: waits for threads, then calls exit functions."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def flags_of(parser: argparse.ArgumentParser) -> Iterable[str]:
    """All flags of a parser, as they are written, in the order in which they were added."""
    return parser._option_string_actions


def has_commands(parser: argparse.ArgumentParser) -> bool:
    """Whether a parser has subparsers."""
    return parser._subparsers is not None
