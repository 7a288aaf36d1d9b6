"""Words of commands that are shown to be copied."""

import os
from pathlib import Path


def path_word(path: str | os.PathLike[str]) -> str:
    """A path as a word that no parser takes for an option."""
    text = str(Path(path))
    return f".{os.sep}{text}" if text.startswith("-") else text
