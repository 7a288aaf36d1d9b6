"""The list of a checkpoint's files: written last, and checked before anything else is read.

A checkpoint of the stock Trainer has none, and one from the Hub neither: what is published is checked in other ways.
"""

from pathlib import Path
from typing import Any

from hf_recycle import __version__
from hf_recycle.checkpoints.run_folder import step_of_name
from hf_recycle.records.file_checks import FORMAT_VERSION, check_version, fail
from hf_recycle.records.files import read_json, write_json
from hf_recycle.utils.whole_files import sha256_of

LIST_FILE = "checkpoint_files.json"

# Nothing that training goes on from: a card may be edited, and arguments are given anew.
_NOT_LISTED = (LIST_FILE, "README.md", "figures", "training_args.bin")
_SMALL = 64 * 2**20  # bytes that are read again in less than a tenth of a second
_REMEDY = f"restore it, use another checkpoint, or delete {LIST_FILE} beside it to resume from what is there unchecked"


def write_list(folder: Path, step: int, *, checksum_all: bool) -> None:
    """Lists what lies in a checkpoint, with sizes in bytes and the SHA-256 of each file up to 64 MiB.

    Args:
        step: of the Trainer.
        checksum_all: also the SHA-256 of larger files.
    """
    listed: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and inside.parts[0] not in _NOT_LISTED:
            size = path.stat().st_size
            listed[inside.as_posix()] = {"size": size}
            if checksum_all or size <= _SMALL:
                listed[inside.as_posix()]["sha256"] = sha256_of(path)
    versions = {"format_version": FORMAT_VERSION, "package_version": __version__}
    write_json(folder / LIST_FILE, {**versions, "step": step, "files": listed})


def check_list(folder: Path) -> list[str]:
    """Compares a checkpoint with its list, if it has one.

    Returns:
        The files of which only the size is known.

    Raises:
        RecyclingFileError: a file is missing, has another size or other content, or the list is of another checkpoint.
    """
    path = folder / LIST_FILE
    if not path.exists():
        return []
    content = read_json(path)
    check_version(path, content.get("format_version"), content.get("package_version"))
    step, listed = content.get("step"), content.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        fail(path, "it holds no list of files")
    if step_of_name(folder) not in (None, step):
        fail(folder, f"it holds the checkpoint of step {step}", "give it the name of its step")
    for name, entry in listed.items():
        try:
            _check(folder / name, entry)
        except OSError as error:  # of a disk that fails, or without the right to read
            fail(folder / name, f"it can't be read ({error.strerror or error})", _REMEDY)
    return [name for name, entry in listed.items() if "sha256" not in entry]


def _check(path: Path, entry: dict) -> None:
    if not path.is_file():
        fail(path, "the file is missing", _REMEDY)
    if (size := path.stat().st_size) != entry.get("size"):
        fail(path, f"it has {size:,} bytes and was written with {entry.get('size'):,}", _REMEDY)
    if "sha256" in entry and sha256_of(path) != entry["sha256"]:
        fail(path, "it was changed or damaged after it was written", _REMEDY)
