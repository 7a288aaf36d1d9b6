"""Where a checkpoint's files come from: a folder, the Hugging Face cache or the Hub."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hf_recycle.checkpoints.run_folder import step_of_name
from hf_recycle.errors import UserError
from hf_recycle.hub.address import is_address, locate
from hf_recycle.hub.explain import explain, is_maybe_a_folder
from hf_recycle.hub.fetch import fetch_file

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"


@dataclass
class Source:
    """The files of one checkpoint, fetched one by one when they are asked for.

    Attributes:
        name: a folder (a run's output folder stands for itself, or for its newest checkpoint if it holds no model), or
            a repository of the Hub, also as `hf://user/repo[@revision][/folder]`, which becomes the repository's name.
        revision: branch, tag or commit of a repository; after the first file, the commit it came from.
        token: token for a private repository.
        trust_pickle: read a repository's `pytorch_model.bin`, if it has no safetensors: torch's unpickler for weights
            refuses everything else, but whoever finds a hole in it can run code on this machine.
        folder: the local one, or None.
        subfolder: of the repository; empty, or ends with a slash.
    """

    name: str
    revision: str | None = None
    token: str | None = None
    trust_pickle: bool = False
    folder: Path | None = field(init=False)
    subfolder: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if is_address(self.name):
            self.folder = None
            self.name, self.subfolder, self.revision = locate(self.name, self.revision)
            return
        path = Path(self.name).expanduser()
        self.folder = _checkpoint_of(path) if path.is_dir() else None
        if self.folder is None and path.exists():
            raise UserError(f"{self.name!r} is a file; name the folder of a model, or a repository of the Hub")
        if self.folder is not None and self.revision is not None:
            raise UserError(
                f"revision={self.revision!r} applies to repositories of the Hub, and {self.name!r} is a folder"
            )

    @property
    def label(self) -> str:
        """How the checkpoint is called in tables and figures."""
        if self.folder is not None:
            return self.name.rstrip("/") or self.name
        revision = f"@{self.revision[:8]}" if self.revision else ""
        return f"{self.name}{revision}{self.subfolder and '/'}{self.subfolder.rstrip('/')}"

    def file(self, name: str) -> Path | None:
        """A local path of the file `name`, downloaded if need be; None if the checkpoint has no such file.

        Raises:
            UserError: the repository or the revision can't be read.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        where = f"{self.name}@{self.revision}" if self.revision else self.name
        try:
            path = fetch_file(self.name, f"{self.subfolder}{name}", self.revision, self.token)
        except UserError:
            raise
        except Exception as error:  # the client lets the errors of its HTTP library through, whichever that is
            # Offline, a file that is not cached and one that does not exist look alike.
            unknown = isinstance(error, LocalEntryNotFoundError) and not self._is_cached()
            if isinstance(error, EntryNotFoundError) and not unknown:
                return None
            problem, remedy = explain(error, f"{self.subfolder}{name}")
            absent = "it is no folder here, and " if is_maybe_a_folder(error) else ""
            raise UserError(f"{where}: {absent}{problem}; {remedy}") from error
        # What follows must come from the same commit, whatever is pushed meanwhile.
        commit = path.parents[len(Path(self.subfolder, name).parts) - 1].name
        if re.fullmatch("[0-9a-f]{40}", commit):
            self.revision = commit
        return path

    def _is_cached(self) -> bool:
        try:
            hf_hub_download(self.name, f"{self.subfolder}config.json", revision=self.revision, local_files_only=True)
        except Exception:
            return False
        return True

    def weight_map(self) -> tuple[dict[str, str] | None, str]:
        """`({tensor: file}, "")` of a sharded checkpoint, or `(None, file)` where one file holds everything.

        Raises:
            UserError: the checkpoint has no weights that can be read, or a damaged index.
        """
        for index, single in ((INDEX, WEIGHTS), (PICKLED_INDEX, PICKLED)):
            if self.folder is None and single == PICKLED and not self.trust_pickle:
                break  # nothing that was downloaded is unpickled
            if (path := self.file(index)) is not None:
                return _read_index(path), ""
            if self.file(single) is not None:
                return None, single
        if self.folder is None:
            raise UserError(
                f"{self.name} has no {WEIGHTS} and no {PICKLED}"
                if self.trust_pickle
                else f"{self.name} has no {WEIGHTS}; if it has a {PICKLED}, and you trust whoever wrote it to run code "
                "on this machine, pass trust_pickle"
            )
        raise UserError(f"{self.folder} holds neither {WEIGHTS} nor {INDEX}; name the folder of a saved model")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weights: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(key): str(value) for key, value in weights.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged (no weight_map can be read from it); copy or download it again") from error
    for file in set(files.values()):
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file) or ".." in file:
            raise UserError(
                f"{path} names the file {file!r}, which is no shard beside it; do not trust this checkpoint"
            )
    return files


def _checkpoint_of(folder: Path) -> Path:
    """`folder`, or the newest `checkpoint-N` in it if it holds no model itself."""
    if (folder / "config.json").is_file():
        return folder
    found = [(step, path) for path in folder.iterdir() if (step := step_of_name(path)) is not None]
    models = [path for _, path in sorted(found) if (path / "config.json").is_file()]
    return models[-1] if models else folder
