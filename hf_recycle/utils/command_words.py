"""Words of commands that are shown to be copied."""

import os
import shutil
import sys
from collections.abc import Container, Sequence
from pathlib import Path


def our_command() -> str:
    """`hf-recycle` as it works where the user stands: by its path unless its virtual environment is active."""
    own = Path(sys.executable).with_name("hf-recycle")
    found = shutil.which(own.name)
    if not own.is_file() or (found is not None and Path(found).absolute() == own.absolute()):
        return own.name
    path = path_from_here(own)
    return path if os.sep in path else f".{os.sep}{path}"


def path_from_here(path: str | os.PathLike[str]) -> str:
    """A path relative to the working directory where it lies below that."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def path_word(path: str | os.PathLike[str]) -> str:
    """A path as a word that no parser takes for an option."""
    text = str(Path(path))
    return f".{os.sep}{text}" if text.startswith("-") else text


def without(words: Sequence[str], names: Container[str]) -> list[str]:
    """The words of a command without some arguments, each of which takes one value or none."""
    kept: list[str] = []
    dropped = False
    for word in words:
        is_value = dropped and not word.startswith("--")
        flag, equals, _ = word.partition("=")
        dropped = word.startswith("--") and flag[2:].replace("-", "_") in names
        if not (dropped or is_value):
            kept.append(word)
        dropped = dropped and not equals
    return kept
