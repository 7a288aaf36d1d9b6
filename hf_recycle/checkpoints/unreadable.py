"""Which file of a checkpoint is damaged, once a library has failed to read it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import safetensors

from hf_recycle.errors import first_line


def unreadable_file(folder: Path) -> tuple[Path, str] | None:
    """The first file of a checkpoint whose format is broken, and what is wrong with it; None if all are well-formed.

    Nothing is unpickled, so it does not matter who wrote them.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:  # as `torch.save` writes
                    if damaged := archive.testzip():
                        raise ValueError(f"its part {damaged} is damaged")
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
        except Exception as error:  # whatever a library says of it
            return path, f"it can't be read ({first_line(error)})"
    return None
