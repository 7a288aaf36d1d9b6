"""What of texts, facts and commands may be published: no token, no local path, no name of this machine or its user."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

TOKEN = re.compile(
    r"\b(?:(?:hf|api_org|ghp|gho)_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-(?:\w+-)?[A-Za-z0-9_]{20,}|xox[abp]-[\w-]{16,})"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
PATH = re.compile(
    r"file://[^\s'\"`,;)\]]*|(?<![\w./~<\\}-])(?:(?:~[\w.-]*|\.{1,2})?/(?!/)[^\s'\"`,;:)\]<>=]*"
    r"|[A-Za-z]:[\\/][^\s'\"`,;)\]]*|\\\\[^\s'\"`,;)\]]+)"
)
WHOLE_PATH = re.compile(r"(?:~[\w.-]*|\.{1,2})?/|[A-Za-z]:[\\/]|\\\\|file://")
_ANY_PATH = re.compile(r"(?<![\w:])[\w.~-]*(?:/[\w.-]+)+/?")
_ADDRESS = re.compile(r"[a-z][a-z0-9+]*://")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# Arguments that hold secrets, or places on the machine that mean nothing elsewhere.
_PRIVATE = re.compile(r".*(token|password|secret|api_key)|(output|logging|cache)_dir|run_name|resume_from_checkpoint")
_NOT_PRIVATE = ("include_num_input_tokens_seen", "include_tokens_per_second")
# Names of values that are places, or repositories where they are none. To a tokenizer "/s>" is a token.
PLACE = re.compile(r".*_(path|dir|file|folder|checkpoint)")
MAY_BE_REPOSITORY = re.compile(r"(_?|.*_)name_or_path|(tokenizer|config|dataset)_name|.*_space_id|hub_model_id")


def is_private(name: str) -> bool:
    """Whether an argument of this name is never published."""
    return name not in _NOT_PRIVATE and _PRIVATE.fullmatch(name) is not None


@dataclass(frozen=True)
class Secrets:
    """What must not leave this machine.

    Attributes:
        tokens: access tokens in use; others are known by their look.
        places: folders of this machine, the deepest first.
        names: of the machine and its user.
    """

    tokens: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of_this_machine(cls, *tokens: str | None, output_dir: str | os.PathLike[str] = ".") -> Secrets:
        home, output = Path.home(), Path(output_dir)
        places = {str(path) for path in (home, Path.cwd(), output.absolute(), output.resolve())}
        names = {socket.gethostname(), home.name, os.environ.get("USER", "")}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            names.add(getpass.getuser())
        return cls(
            tuple({token for token in (*tokens, get_token()) if token}),
            tuple(sorted(places - {"/"}, key=len, reverse=True)),
            tuple(sorted(name for name in names if len(name) > 3)),
        )

    def facts(self, value: Any, name: str = "") -> Any:
        """Facts of a run as JSON types: every text cleaned, entries with a private name dropped, and of what is no JSON
        type the name of its type."""
        if isinstance(value, Enum):
            value = value.value
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self.value(name, value)
        if isinstance(value, Mapping):
            entries = {str(key): item for key, item in value.items() if not is_private(str(key))}
            return {self.text(key): self.facts(item, key) for key, item in entries.items()}
        if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
            return [self.facts(item, name) for item in value]
        return type(value).__name__

    def value(self, name: str, text: str) -> str:
        """The value of an argument; where it is a place, a relative path is one too."""
        may_be_repository = MAY_BE_REPOSITORY.fullmatch(name)
        if may_be_repository and _REPOSITORY.fullmatch(text) and not os.path.exists(text):
            return self.without_tokens(text)
        if (may_be_repository or PLACE.fullmatch(name)) and "/" in text and not _ADDRESS.match(text):
            text = last_part(text)
        return self.text(text)

    def text(self, text: str) -> str:
        """Tokens masked, paths reduced to their last part, names left out."""
        text = self.without_tokens(text)
        if WHOLE_PATH.match(text) and "\n" not in text:
            text = last_part(text)  # as a whole, because it may hold spaces
        text = PATH.sub(lambda match: last_part(match[0]), text)
        return text if _REPOSITORY.fullmatch(text) else without(self.names, text)

    def command(self, words: Sequence[str], known: Collection[str]) -> str:
        """A command line as one line of shell, without private options and without any path, relative ones included.

        Args:
            known: words that are no paths though they look it, such as the names of packaged recipes.
        """
        kept: list[str] = []
        name = ""
        for word in words:
            if word.startswith("--"):
                option, equals, value = word.partition("=")
                name = option[2:].replace("-", "_")
                if not is_private(name):
                    kept.append(option + equals + self._word(name, value))
            elif not is_private(name):
                kept.append(word if word in known else self._word(name, word))
        return " ".join(shlex.quote(" ".join(word.split())) if word else "''" for word in kept)

    def _word(self, name: str, text: str) -> str:
        if MAY_BE_REPOSITORY.fullmatch(name) or _ADDRESS.match(text):
            return self.value(name, text)
        if re.search("[={]", text):  # several values in one
            return self.text(_ANY_PATH.sub(lambda match: last_part(match[0]), text))
        return self.text(last_part(text) if "/" in text else text)

    def without_tokens(self, text: str) -> str:
        """The text with every token masked, and without passwords in addresses."""
        for token in self.tokens:
            text = text.replace(token, "…")
        return _CREDENTIALS.sub("", TOKEN.sub("…", text))


def without(names: Sequence[str], text: str) -> str:
    for name in names:
        text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", "…", text)
    return text


def last_part(path: str) -> str:
    kind = PureWindowsPath if re.match(r"[A-Za-z]:|\\", path) else PurePosixPath
    place = kind(path.removeprefix("file:"))
    # The last part of a home folder is the user's name.
    is_home = str(place) == str(Path.home()) or str(place.parent) in ("/home", "/Users") or place.name.startswith("~")
    return "…" if is_home or place.name in ("", "..") else place.name
