"""What of a file may be published: text loses tokens, local paths and names of this machine, and nothing else."""

import json
import os
import re
from pathlib import Path
from typing import Any

from hf_recycle.hub.push.layout import CARD, is_weights
from hf_recycle.hub.scrub import MAY_BE_REPOSITORY, PATH, PLACE, TOKEN, WHOLE_PATH, Secrets, last_part, without

_LEARNT = ("vocab", "merges", "added_tokens", "chat_template")
_EVERYWHERE = ("usr", "bin", "dev", "etc")  # on every machine
_LARGE = 64 * 2**20


class Withheld(Exception):
    """A file can't be published without giving a secret away; the text says why."""


def published_content(path: Path, secrets: Secrets) -> Path | bytes:
    """What to publish of a file: the file itself, or other bytes.

    Raises:
        Withheld: if it holds a token and can't be cleaned.
    """
    if is_weights(path.name) or path.stat().st_size > _LARGE:
        return path
    data = original = path.read_bytes()
    if path.name == CARD:
        data = clean_card(data.decode("utf-8", "surrogateescape"), secrets).encode("utf-8", "surrogateescape")
    elif path.suffix == ".json":
        data = _json_file(data, secrets)
    if TOKEN.search(data.decode("latin-1")) or any(token.encode() in data for token in secrets.tokens):
        raise Withheld("it holds an access token")
    return path if data == original else data


def clean_card(text: str, secrets: Secrets) -> str:
    """A card, or any text of a user's: only what is certainly a secret of this machine goes."""
    text = secrets.without_tokens(text)
    for place in secrets.places:
        if place.count("/") > 1:
            text = re.sub(rf"{re.escape(place)}(?![\w-])[^\s'\"`,;:)\]<>]*", lambda m: last_part(m[0]), text)
    text = PATH.sub(lambda match: last_part(match[0]) if _is_here(match[0], secrets) else match[0], text)
    # A plain word could mean anything; a name such as gpu-07.lab or jane_doe is a machine's or a user's.
    return without([name for name in secrets.names if re.search(r"[0-9._-]", name)], text)


def _is_here(path: str, secrets: Secrets) -> bool:
    """Whether a path is one of this machine, and not a link on a page or a token of a tokenizer."""
    if not path.startswith("/"):
        return re.match(r"file:|~\w|[A-Za-z]:[\\/]", path) is not None
    top, _, rest = path[1:].partition("/")
    known = f"/{top}" in secrets.places or (top not in _EVERYWHERE and os.path.exists(f"/{top}"))
    return path.rstrip("/.") in secrets.places or bool(top and rest and known)


def _json_file(data: bytes, secrets: Secrets) -> bytes:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    cleaned = _json(content, secrets)
    # As it is where nothing had to go: some files have checksums, all have a layout.
    return data if cleaned == content else (json.dumps(cleaned, indent=2) + "\n").encode()


def _json(value: Any, secrets: Secrets, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: item if _is_learnt(key, item) else _json(item, secrets, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item, secrets, name) for item in value]
    if not isinstance(value, str):
        return value
    if PLACE.fullmatch(name) or MAY_BE_REPOSITORY.fullmatch(name):
        return secrets.value(name, value)
    return clean_card(last_part(value) if WHOLE_PATH.match(value) and _is_here(value, secrets) else value, secrets)


def _is_learnt(name: str, value: Any) -> bool:
    """Whether an entry of a JSON file is what a tokenizer learnt, where "/data" may be a token."""
    return name in _LEARNT and not (name in ("vocab", "merges") and isinstance(value, str))
