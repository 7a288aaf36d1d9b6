"""A push: what goes to the Hub, and where."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_recycle.errors import UserError
from hf_recycle.utils.command_words import path_word

# In a staged folder; hidden, so it is never published.
JOB_FILE = ".push.json"
_STORED = ("message", "description", "repo_id", "revision", "checkpoint", "tag", "always", "private")


@dataclass(frozen=True)
class Push:
    """One commit: the model of a folder at the root of a repository and, if asked for, all of it as a checkpoint.

    Attributes:
        folder: a checkpoint, a staged copy of one, or an output folder.
        repo_id: as the user names it; it may lack the namespace.
        message, description: of the commit.
        revision: the branch; None for `main`.
        checkpoint: the folder of the repository that gets everything in `folder`, such as `last-checkpoint`.
        tag: set on the commit; one of this name that is there is moved.
        always: lands even if a newer push waits behind it.
        private: whether the repository is made private if it is made, by whoever publishes it later; None for the
            namespace's default.
        staged: `folder` is a copy made for this push, to be removed once it has landed.
        token: another than the run's; never written anywhere.
    """

    folder: Path
    repo_id: str
    message: str
    description: str = ""
    revision: str | None = None
    checkpoint: str | None = None
    tag: str | None = None
    always: bool = False
    private: bool | None = None
    staged: bool = False
    token: str | None = field(default=None, repr=False)

    @property
    def command(self) -> str:
        """What publishes it later."""
        words = ["hf-recycle", "push", path_word(self.folder), self.repo_id]
        if self.revision:
            words += ["--revision", self.revision]
        if not self.staged:  # a staged folder remembers them
            words += ["--tag", self.tag] if self.tag else []
            words += ["--private"] if self.private else []
        return shlex.join(words)

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    @property
    def has_own_folder(self) -> bool:
        """Whether it fills a folder of the repository that no other push fills."""
        return self.checkpoint is not None and self.checkpoint.startswith("checkpoint-")

    def save(self, folder: Path) -> None:
        """Writes into a staged folder what it is for."""
        values = {key: value for key, value in asdict(self).items() if key in _STORED}
        Path(folder, JOB_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Push:
        """The push that a staged folder is for.

        Raises:
            UserError: if its note is damaged.
        """
        path = Path(folder, JOB_FILE)
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(Path(folder), staged=True, **{key: values[key] for key in _STORED})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} can't be read ({type(error).__name__}): remove it to push the folder.") from None

    def to(self, **changes: Any) -> Push:
        return replace(self, **changes)
