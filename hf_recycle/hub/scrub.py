"""What may be published of arguments and commands: no token, no local path, no name of the machine."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# Secrets, and places on the machine that mean nothing elsewhere.
_DROPPED = re.compile(r".*(token|password|secret|api_key)|(output|logging|cache)_dir|run_name|resume_from_checkpoint")
_NOT_SECRET = ("include_num_input_tokens_seen", "include_tokens_per_second")
_TOKEN = re.compile(r"\b(?:hf|api_org|sk|ghp|gho|github_pat|xox[abp])[_-][A-Za-z0-9_-]{8,}")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_START = r"(?<![\w./:~\\-])"
_PATH = re.compile(
    rf"file://[^\s'\",;)\]]*|{_START}(?:~[\w.-]*|\.{{1,2}})?/[^\s'\",;:=)\]]+|{_START}[A-Za-z]:[\\/][^\s'\",;)\]]*"
)


def scrub(value: Any) -> Any:
    """`value` without what must not be published, as JSON types.

    Texts are scrubbed by `scrub_text`; of mappings, entries whose names say that they hold a secret or a place on the
    machine (`hub_token`, `output_dir`, ...) are dropped; what is no JSON type becomes the name of its type.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, Mapping):
        return {scrub_text(str(key)): scrub(item) for key, item in value.items() if not is_private(str(key))}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [scrub(item) for item in value]
    return type(value).__name__


def is_private(name: str) -> bool:
    """Whether an argument of this name is never published."""
    return name not in _NOT_SECRET and _DROPPED.fullmatch(name) is not None


def scrub_text(text: str) -> str:
    """Tokens masked, paths reduced to their last part, the machine's name left out; otherwise as it is."""
    text = _TOKEN.sub(lambda match: f"{match[0].split('_')[0].split('-')[0]}_…", text)
    text = _CREDENTIALS.sub("", text)
    if _is_path(text):
        text = _last_part(text)  # as a whole, because it may hold spaces
    else:
        text = _PATH.sub(lambda match: _last_part(match[0]), text)
    host = socket.gethostname()
    # A plain word could mean anything; a name such as gpu-07.lab is a machine's.
    if len(host) > 3 and re.search(r"[0-9.-]", host):
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "…", text)
    return text


def scrub_command(words: Sequence[str]) -> str:
    """A command line as one line of shell, without the arguments that are private and their values."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            dropping = is_private(name[2:].replace("-", "_"))
            if not dropping:
                kept.append(name + equals + scrub_text(value))
        elif not dropping:
            kept.append(scrub_text(word))
    return " ".join(_quote(word) for word in kept)


def _quote(word: str) -> str:
    return shlex.quote(" ".join(word.split())) if word else "''"


def _is_path(text: str) -> bool:
    return bool(re.match(r"~?/|~[\w.-]+/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\|file://", text)) and "\n" not in text


def _last_part(path: str) -> str:
    kind = PureWindowsPath if re.match(r"[A-Za-z]:|\\", path) else PurePosixPath
    name = kind(path.removeprefix("file:")).name
    return "…" if name in ("", "..", "~") or name.startswith("~") else name
