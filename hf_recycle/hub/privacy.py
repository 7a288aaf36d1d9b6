"""What of a file may be published: no token, no local path, no name of the machine or of its user.

`scrub.py` knows how a secret looks; this module knows the files, and the secrets of this very machine.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_recycle.hub.layout import CARD, is_weights
from hf_recycle.hub.pickled_arguments import scrub_arguments
from hf_recycle.hub.scrub import scrub_text

ARGUMENTS_FILE = "training_args.bin"

# Entries of JSON files that name a place. Others are left alone: to a tokenizer "/s>" and a user's name are tokens.
_PLACE = re.compile(r"_?name_or_path|.*_(path|dir|file|folder|checkpoint)")
_TOKEN = re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{16,}")
_LARGE = 64 * 2**20


class Withheld(Exception):
    """A file can't be published without giving a secret away; the text says why."""


@dataclass(frozen=True)
class Secrets:
    """What must not leave this machine.

    Attributes:
        tokens: access tokens in use.
        places: folders whose absolute path tells about the machine.
        public: a text whose words are no secret: the name of the repository.
    """

    tokens: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    public: str = ""

    @classmethod
    def of_this_machine(cls, *tokens: str | None, output_dir: Path, public: str) -> Secrets:
        known = {token for token in (*tokens, get_token()) if token}
        places = {str(path) for path in (Path.home(), Path.cwd(), output_dir.absolute(), output_dir.resolve())}
        return cls(tuple(known), tuple(sorted(places - {"/"}, key=len, reverse=True)), public)

    def content(self, path: Path) -> Path | bytes:
        """What to publish of a file: the file itself, or other bytes.

        Raises:
            Withheld: if it can't be published.
        """
        if path.name == ARGUMENTS_FILE:
            try:
                data = scrub_arguments(path.read_bytes(), self.argument)
            except Exception as error:
                raise Withheld(f"it can't be read safely ({type(error).__name__})") from error
        elif is_weights(path.name) or path.stat().st_size > _LARGE:
            return path
        elif path.suffix in (".json", ".md"):
            original = path.read_bytes()
            data = self._text(original, path)
            if data == original:
                data = path
        else:
            data = path
        self._check(data)
        return data

    def argument(self, text: str) -> str:
        """One value of the training arguments."""
        return self._without_names(scrub_text(self._without_tokens(text)))

    def place(self, text: str) -> str:
        return scrub_text(self._without_tokens(text))

    def card(self, text: str) -> str:
        for place in self._places:
            text = place.sub("…", text)
        return self._without_tokens(text)

    def _text(self, data: bytes, path: Path) -> bytes:
        text = data.decode("utf-8", "surrogateescape")
        if path.name == CARD:
            return self.card(text).encode("utf-8", "surrogateescape")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return data
        scrubbed = self._json(content)
        # As it is where nothing had to go: some files have checksums, all have a layout.
        return data if scrubbed == content else (json.dumps(scrubbed, indent=2, ensure_ascii=False) + "\n").encode()

    def _json(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: item if _is_learnt(name, item) else self._json(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._json(item, key) for item in value]
        if not isinstance(value, str):
            return value
        if _PLACE.fullmatch(key) or any(place.search(value) for place in self._places):
            # A repository's name is no place, though it has a slash.
            value = self.place(value) if not _is_relative(value) else _last_part(value, key)
        return self._without_tokens(value)

    @cached_property
    def _places(self) -> list[re.Pattern[str]]:
        return [_pattern(place) for place in self.places]

    def _without_tokens(self, text: str) -> str:
        for token in self.tokens:
            text = text.replace(token, "…")
        return text

    def _without_names(self, text: str) -> str:
        for name in self._names:
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "…", text)
        return text

    @cached_property
    def _names(self) -> list[str]:
        names = {socket.gethostname(), Path.home().name, os.environ.get("USER", "")}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            names.add(getpass.getuser())
        return [name for name in names if len(name) > 2 and name not in self.public]

    def _check(self, data: Path | bytes) -> None:
        """The last look, at the bytes as they go out."""
        for part in _parts(data):
            if _TOKEN.search(part) or any(token.encode() in part for token in self.tokens):
                raise Withheld("it holds an access token")


def _pattern(place: str) -> re.Pattern[str]:
    """Finds a folder in a text, alone or at the beginning of a path.

    One right under the root, as containers work in, is spelled like a part of other names (alice/data-bert, ./data,
    https://x.org/data, </data>), so it counts only where it is a path of its own. Deeper ones are found anywhere.
    """
    words = re.escape(place)
    return re.compile(rf"(?<![\w.~}}-])(?<!:/){words}(?!\w|[.-]+\w|>)" if place.count("/") == 1 else words)


def _is_learnt(name: str, value: Any) -> bool:
    """Whether an entry of a JSON file is what a tokenizer learnt, where "/data" may be a token."""
    return name in ("vocab", "merges") and not isinstance(value, str)


def _is_relative(text: str) -> bool:
    return not re.match(r"~|\.{0,2}/|[A-Za-z]:[\\/]|\\\\|file://", text)


def _last_part(text: str, key: str) -> str:
    # runs/julie/checkpoint-20 is a place, user/repo a name.
    return text if key.endswith("name_or_path") or "/" not in text else text.rstrip("/").rpartition("/")[2]


def _parts(data: Path | bytes) -> list[bytes]:
    """The bytes of a file; of an archive of tensors only its pickles, which hold the texts."""
    if isinstance(data, Path) and zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    return [data if isinstance(data, bytes) else data.read_bytes()]
