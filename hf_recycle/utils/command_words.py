"""Words of commands that are shown to be copied."""

import os
from collections.abc import Container, Sequence
from pathlib import Path


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
