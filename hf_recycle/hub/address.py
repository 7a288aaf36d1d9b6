"""`hub://user/repo[/folder][@revision]`: where on the Hub a checkpoint lies."""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_recycle.errors import UserError

SCHEME = "hub://"
LAST = "last-checkpoint"
"""The folder that `hub_strategy=checkpoint` keeps up to date."""

_FOLDER = re.compile(rf"{LAST}|checkpoint-[0-9]{{1,18}}")
# What git allows in the name of a branch or tag, about.
_REVISION = re.compile(r"(?!.*\.\.)[^\s\x00-\x1f\x7f~^:?*\[\\@/.-][^\s\x00-\x1f\x7f~^:?*\[\\]{0,249}")


@dataclass(frozen=True)
class HubAddress:
    """A checkpoint on the Hub.

    Attributes:
        repo_id: `"user/repo"`.
        folder: `"last-checkpoint"` or `"checkpoint-N"`; None for the newest checkpoint of the repository.
        revision: branch, tag or commit; None for the default branch.
    """

    repo_id: str
    folder: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        user, _, name = self.repo_id.partition("/")
        if not user or not name:
            raise UserError(f"{_shown(self.repo_id)} does not name a repository of the Hub; write user/repo")
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(f"{_shown(self.repo_id)} is not the name of a repository ({error})") from None
        if self.folder is not None and not _FOLDER.fullmatch(self.folder):
            raise UserError(f"folder {_shown(self.folder)} is not a checkpoint's; write {LAST} or checkpoint-N")
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            raise UserError(f"revision {_shown(self.revision)} is not the name of a branch, tag or commit")

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """The address that `text` spells.

        Raises:
            UserError: it is malformed, with what is wrong.
        """
        if not is_address(text):
            raise UserError(f"{_shown(text)} is not an address on the Hub; write {SCHEME}user/repo")
        path, at, revision = text.removeprefix(SCHEME).partition("@")
        parts = path.split("/")
        try:
            if len(parts) > 3:
                raise UserError(f"{_shown('/'.join(parts[2:]))} is no checkpoint folder of a repository")
            return cls("/".join(parts[:2]), parts[2] if parts[2:] else None, revision if at else None)
        except UserError as error:
            form = f"the form is {SCHEME}user/repo[/{LAST} or /checkpoint-N][@revision]"
            raise UserError(f"{_shown(text)} is malformed: {error}; {form}") from None

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo_id}{folder}{revision}"


def is_address(text: object) -> bool:
    """Whether something is meant as an address on the Hub."""
    return isinstance(text, str) and text.startswith(SCHEME)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."
