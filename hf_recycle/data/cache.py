"""Where trained tokenizers and tokenised data are kept between runs."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """A folder below the cache root: `HF_RECYCLE_CACHE`, or `~/.cache/hf_recycle`. It is created."""
    root = os.environ.get("HF_RECYCLE_CACHE") or Path.home() / ".cache" / "hf_recycle"
    folder = Path(root).expanduser().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fill(temporary folder)` if it does not exist yet.

    The folder appears whole or not at all: it is filled under another name and renamed. Of several processes
    that fill it at once the first one wins, and the others use what it wrote.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private; a shared cache is meant to be read by others
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
