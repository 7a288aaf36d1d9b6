"""Merging a model card with the one that is there already, so that what people wrote by hand survives.

In the text, what is ours lies between two HTML comments. In the YAML header, which editors rewrite at will, a third
comment inside our text remembers what we wrote: digests of our values, by key. So a header is merged from three
sides: what we wrote last time, what is there now, and what we want to write.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

BEGIN = "<!-- hf_recycle:begin - written anew with each save; text outside of these two marks is kept -->"
END = "<!-- hf_recycle:end -->"
_MARK = re.compile(r"^<!-- hf_recycle:(begin|end)\b.*-->[ \t]*\r?$")
_HEADER_MARK = re.compile(r"^<!-- hf_recycle:header (\{.*\}) -->\r?$", re.MULTILINE)
_KEY = re.compile(r"^(?:\"([^\"\\]+)\"|'([^'\\]+)'|([^\s#'\"\[\]{}&*!|>%@`,?:-][^#:]*?))\s*:(?:\s|$)")
# Their entries are added up, one by one, with those of the user.
_LISTS = ("tags", "datasets", "metrics", "language", "model-index")

_MAX_ALIASES = 20  # more could stand for more values than fit into memory

Header = dict[str, Any]


def compose_card(header: Header, text: str) -> str:
    """A card of ours: YAML header (without the keys that have no value), then `text` between the marks."""
    header = {key: value for key, value in header.items() if value is not None and value != []}
    return f"---\n{_dump(header)}---\n\n{_own_text(header, text)}"


def merge_card(theirs: str, ours: str) -> str:
    """The card `theirs` with everything of ours in it brought up to `ours`, and nothing else changed.

    Ours between the marks is replaced; where `theirs` has no pair of marks, ours is added at the end and marks that
    have lost their partner are dropped. In the header, keys of the user are kept as they stand, with their comments;
    lists such as tags and datasets hold our entries and the user's; a value of ours that was changed by hand stays
    changed. A header that is not a YAML mapping is kept as text. Merging the same card again changes nothing.

    Args:
        theirs: any text, also empty or damaged.
        ours: a card made by `compose_card`; its header may have been damaged since.

    Raises:
        ValueError: `ours` lacks our marks.
    """
    our_raw, our_text = _split(ours)
    our_header = _load(our_raw) or {}
    their_raw, their_text = _split(theirs.removeprefix("\ufeff"))
    pieces = _pieces(their_text)
    own = "".join(text for is_own, text in pieces if is_own)
    header = _merge_header(their_raw, _digests_in(own or their_text), our_header)
    kept = [(is_own, text) for is_own, text in pieces if is_own or not _HEADER_MARK.match(text)]
    # Without anything in it, two rules would be no header but text.
    top = f"---\n{header}---\n" if header else ""
    return top + _merge_text(kept, our_text[our_text.index(BEGIN) :])


def valid_card(card: str) -> str:
    """A card that the Hub takes: as it is, but a header that is no mapping of YAML becomes text, an empty one goes."""
    raw, text = _split(card)
    return card if _load(raw) else text


# ---- Text ----


def _own_text(header: Header, text: str) -> str:
    # No "--" may stand inside an HTML comment.
    digests = json.dumps(_digests(header), separators=(",", ":")).replace("--", "-\\u002d")
    return f"{BEGIN}\n<!-- hf_recycle:header {digests} -->\n\n{text.strip()}\n\n{END}\n"


def _merge_text(pieces: list[tuple[bool, str]], ours: str) -> str:
    first = next((i for i, (own, _) in enumerate(pieces) if own), None)
    if first is not None:
        return "".join(ours if i == first else "" if own else text for i, (own, text) in enumerate(pieces))
    text = "".join(text for _, text in pieces)
    if not text.strip():
        return f"\n{ours}"
    return text + "\n" * max(0, 2 - (len(text) - len(text.rstrip("\n")))) + ours


def _pieces(text: str) -> list[tuple[bool, str]]:
    """`text` in pieces, each with whether it is ours: a pair of marks and what lies between."""
    pieces: list[tuple[bool, str]] = []
    pending: list[str] | None = None  # lines since a mark that begins
    for line in _lines(text):
        mark = _MARK.match(line.rstrip("\n"))
        if mark is None:
            if pending is None:
                pieces.append((False, line))
            else:
                pending.append(line)
        elif mark[1] == "end":
            if pending is not None:
                pieces.append((True, "".join(pending)))
            pending = None
        else:
            pieces += [(False, kept) for kept in pending or []]
            pending = []
    return pieces + [(False, kept) for kept in pending or []]


def _lines(text: str) -> list[str]:
    """Lines with their ends. Not `splitlines`, which also splits at characters that Markdown and YAML don't."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# ---- Header ----


def _split(card: str) -> tuple[str, str]:
    """The YAML of a card, and the text after it; a header that is no mapping of YAML counts as text."""
    match = REGEX_YAML_BLOCK.match(card)
    if not match:
        return "", card
    raw = match[2].replace("\r\n", "\n").replace("\r", "\n") + "\n"
    header = _load(raw)
    if header is None:
        # Fenced, or else Markdown would take it for a heading.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", raw)), default=0))
        return "", f"\n{fence}yaml\n{raw}{fence}\n{card[match.end() :]}"
    return raw, card[match.end() :]


def _load(raw: str) -> Header | None:
    try:
        if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(raw)) > _MAX_ALIASES:
            return None
        header = yaml.safe_load(raw)
        json.dumps(header, default=str)  # what holds itself could not be written again
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None
    if header is None:
        return {}
    return header if isinstance(header, dict) and all(isinstance(key, str) for key in header) else None


def _merge_header(raw: str, written: dict[str, Any], ours: Header) -> str:
    theirs = _load(raw) or {}
    merged: Header = {}
    for key in [*ours, *theirs]:
        if key in merged:
            continue
        value = _merge_value(key, theirs.get(key), written.get(key), ours.get(key))
        if value is not None or key not in (*ours, *written):
            merged[key] = value
    # The user's own keys as they stand, for the sake of comments and layout; if that changes their meaning, anew.
    chunks = [text for key, text in _chunks(raw) if key is None or (key in merged and key not in (*ours, *written))]
    own = {key: value for key, value in merged.items() if key in (*ours, *written)}
    text = (_dump(own) if own else "") + "".join(chunks)
    return text if _load(text) == merged else _dump(merged)


def _merge_value(key: str, theirs: Any, written: Any, ours: Any) -> Any:
    """The value of one key; None for none."""
    if key in _LISTS and (ours is not None or written is not None):
        items = _items(key, ours)
        known = {*(written if isinstance(written, list) else ()), *map(_digest, items)}
        return _from_items(key, items + [item for item in _items(key, theirs) if _digest(item) not in known])
    if theirs is None:
        return ours
    if written is None:
        return theirs if ours is None else ours
    return ours if _digest(theirs) == written else theirs


def _items(key: str, value: Any) -> list[Any]:
    """The entries of a list; of a model-index its results, each with the name of its model."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if key != "model-index":
        return values
    items = []
    for model in values:
        results = model.get("results") if isinstance(model, dict) else None
        if isinstance(results, list) and set(model) == {"name", "results"}:
            items += [{"name": model["name"], "results": [result]} for result in results]
        else:
            items.append(model)
    return items


def _from_items(key: str, items: list[Any]) -> list[Any] | None:
    if key != "model-index":
        return items or None
    models: list[Any] = []
    for item in items:
        whole = isinstance(item, dict) and isinstance(item.get("results"), list) and set(item) == {"name", "results"}
        same = next((m for m in models if whole and m[0] and m[1]["name"] == item["name"]), None)
        if same is not None:
            same[1]["results"] += item["results"]
        else:
            models.append((whole, {**item, "results": list(item["results"])} if whole else item))
    return [model for _, model in models] or None


def _chunks(raw: str) -> list[tuple[str | None, str]]:
    """The lines of a header by the top-level key they belong to; None for comments of their own."""
    chunks: list[tuple[str | None, str]] = []
    for line in _lines(raw):
        key = _KEY.match(line)
        if key:
            chunks.append((next(group for group in key.groups() if group), line))
        elif line.startswith("#") or (not chunks and line.strip()):
            chunks.append((None, line))
        elif chunks:
            chunks[-1] = (chunks[-1][0], chunks[-1][1] + line)
    return chunks


def _digests(header: Header) -> dict[str, Any]:
    return {
        key: [_digest(item) for item in _items(key, value)] if key in _LISTS else _digest(value)
        for key, value in header.items()
    }


def _digests_in(text: str) -> dict[str, Any]:
    """What we wrote into the header last time, by the comment in our text; empty if that is gone."""
    match = _HEADER_MARK.search(text)
    if not match:
        return {}
    try:
        digests = json.loads(match[1])
    except (ValueError, RecursionError):
        return {}
    plain = {key: value for key, value in digests.items() if isinstance(value, str)}
    lists = {key: [d for d in value if isinstance(d, str)] for key, value in digests.items() if isinstance(value, list)}
    return plain | lists


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _dump(header: Header) -> str:
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
