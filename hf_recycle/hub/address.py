"""`hf://user/repo[@revision][/folder]`: where on the Hub a model or a checkpoint lies, as huggingface_hub spells it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

from huggingface_hub import parse_hf_uri
from huggingface_hub.errors import HfUriError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_recycle.errors import UserError

SCHEME = "hf://"
ALIAS = "hub://"
"""The scheme of earlier versions, which also took the revision last: `hub://user/repo/folder@revision`."""
LAST = "last-checkpoint"
"""The folder that `hub_strategy=checkpoint` keeps up to date."""

_CHECKPOINT = re.compile(rf"{LAST}|checkpoint-[0-9]{{1,18}}")
_FOLDER = re.compile(r"(?!.*(^|/)\.{0,2}(/|$))[^\s\x00-\x1f\x7f\\:?*]{1,400}")
# What git allows in the name of a branch or tag, about.
_REVISION = re.compile(r"(?!.*\.\.)[^\s\x00-\x1f\x7f~^:?*\[\\@/.-][^\s\x00-\x1f\x7f~^:?*\[\\]{0,249}")
_PLAIN_REF = re.compile(r"refs/(convert/[\w.-]+|pr/\d+)")  # the only revisions whose slashes are written as such
# Of the alias: the revision may come last, and may hold slashes, unless what follows is a checkpoint's folder.
_LAST_REVISION = re.compile(
    rf"(?P<repo>[^@/]*/[^@/]*)/?(?P<folder>[^@]*)@(?P<revision>.*?)(?:/(?P<last>{_CHECKPOINT.pattern}))?", re.DOTALL
)
_FORM = f"the form is {SCHEME}user/repo[@revision][/folder], a slash in the revision written as %2F"


@dataclass(frozen=True)
class HubAddress:
    """A model or a checkpoint on the Hub.

    Attributes:
        repo_id: `"user/repo"`.
        folder: inside the repository, such as `"last-checkpoint"` or `"checkpoint-N"`; None: none is named.
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
            raise UserError(f"{_shown(self.folder)} is not a folder of a repository")
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
        try:
            found = parse_hf_uri(_canonical(text))
            if found.type != "model":
                raise UserError(f"it names a {found.type}, and models are expected")
            return cls(found.id, found.path_in_repo or None, found.revision)
        except HfUriError as error:
            problem = error.msg.strip(" .")
        except UserError as error:
            problem = str(error)
        raise UserError(f"{_shown(text)} is malformed: {problem[:200]}; {_FORM}")

    def check_checkpoint(self) -> None:
        """Refuses a folder that no checkpoint has; none at all stands for the newest checkpoint.

        Raises:
            UserError: with the names there are.
        """
        if self.folder is not None and not _CHECKPOINT.fullmatch(self.folder):
            raise UserError(
                f"folder {_shown(self.folder)} is not a checkpoint's; write {LAST} or checkpoint-N, and a slash in a "
                "revision as %2F"
            )

    def __str__(self) -> str:
        return _spelled(self.repo_id, self.revision, self.folder)


def is_address(text: object) -> bool:
    """Whether something is meant as an address on the Hub."""
    return isinstance(text, str) and text.startswith((SCHEME, ALIAS))


def locate(text: str, revision: str | None = None) -> tuple[str, str, str | None]:
    """`(repository, folder, revision)` of an address, or of a plain name of a repository; the folder is empty, or ends
    with a slash.

    Args:
        revision: given beside it.

    Raises:
        UserError: the address is malformed, or names another revision.
    """
    if not is_address(text):
        return text, "", revision
    address = HubAddress.parse(text)
    if revision is not None and address.revision not in (None, revision):
        raise UserError(f"revision={revision!r} contradicts {text}; give one of them")
    return address.repo_id, f"{address.folder}/" if address.folder else "", address.revision or revision


def _canonical(text: str) -> str:
    """As huggingface_hub spells it."""
    if text.startswith(SCHEME):
        return text
    body = text.removeprefix(ALIAS)
    if (match := _LAST_REVISION.fullmatch(body)) and match["revision"]:
        return _spelled(match["repo"], match["revision"], match["folder"] or match["last"])
    return SCHEME + body


def _spelled(repo_id: str, revision: str | None, folder: str | None) -> str:
    revision = revision or ""
    if not _PLAIN_REF.fullmatch(revision):
        revision = quote(revision, safe="%")
    return f"{SCHEME}{repo_id}{'@' if revision else ''}{revision}{'/' if folder else ''}{folder or ''}"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."
