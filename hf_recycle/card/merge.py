"""Merging a model card with the one that is there already, so that what people wrote or deleted by hand stays so.

In the text, what is ours lies between two HTML comments. A third one inside remembers what we have ever written there:
digests of our values in the YAML header, which editors rewrite at will, and the headings of our sections. So a key or a
section that we wrote and that is there no more was deleted by hand, and is not written again.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

BEGIN = "<!-- hf_recycle:begin - written anew with each save; text outside of these two marks is kept -->"
END = "<!-- hf_recycle:end -->"
_MARK = re.compile(r"^<!-- hf_recycle:(begin|end)\b.*-->[ \t]*\r?$")
_RECORD = re.compile(r"^<!-- hf_recycle:written (\{.*\}) -->\r?\n?", re.MULTILINE)
_HEADING = re.compile(r"^## .*", re.MULTILINE)
_KEY = re.compile(r"^(?:\"([^\"\\]+)\"|'([^'\\]+)'|([^\s#'\"\[\]{}&*!|>%@`,?:-][^#:]*?))\s*:(?:\s|$)")

_MAX_ALIASES = 20  # more could stand for more values than fit into memory

Header = dict[str, Any]


@dataclass
class _Written:
    """What we have written into a card: digests of the header's values by key, and the headings of our sections."""

    keys: dict[str, str] = field(default_factory=dict)
    sections: list[str] = field(default_factory=list)

    @classmethod
    def found_in(cls, text: str) -> _Written:
        match = _RECORD.search(text)
        try:
            values = json.loads(match[1]) if match else {}
        except (ValueError, RecursionError):
            values = {}
        keys, sections = values.get("keys"), values.get("sections")
        return cls(
            {key: digest for key, digest in keys.items() if isinstance(digest, str)} if isinstance(keys, dict) else {},
            [name for name in sections if isinstance(name, str)] if isinstance(sections, list) else [],
        )

    def __str__(self) -> str:
        # No "--" may stand inside an HTML comment.
        values = json.dumps({"keys": self.keys, "sections": self.sections}, separators=(",", ":"))
        return "<!-- hf_recycle:written " + values.replace("--", "-\\u002d") + " -->\n"


def compose_card(header: Header, text: str) -> str:
    """A card of ours: YAML header (without the keys that have no value), then `text` between the marks."""
    header = {key: value for key, value in header.items() if value is not None and value != []}
    written = _Written({key: _digest(value) for key, value in header.items()}, _headings(text))
    return f"---\n{_dump(header)}---\n\n{BEGIN}\n{written}\n{text.strip()}\n\n{END}\n"


def merge_card(theirs: str, ours: str) -> str:
    """The card `theirs` with everything of ours in it brought up to `ours`, and nothing else changed.

    Ours between the marks is replaced, but for sections that were deleted by hand; where `theirs` has no pair of
    marks, ours is added at the end and marks that have lost their partner are dropped. Where nothing is left between
    the marks, nothing of ours is written any more. In the header, a key is written if it was never there or is still
    as we wrote it; other keys are kept as they stand, with their comments. A header that is not a YAML mapping is kept
    as text. Merging the same card again changes nothing.

    Args:
        theirs: any text, also empty or damaged.
        ours: a card made by `compose_card`; its header may have been damaged or edited since.

    Raises:
        ValueError: `ours` lacks our marks.
    """
    our_raw, our_text = _split(ours)
    our_header = _load(our_raw) or {}
    our_block = our_text[our_text.index(BEGIN) :]
    their_raw, their_text = _split(theirs.removeprefix("\ufeff"))
    pieces = _pieces(their_text)
    own = "".join(text for is_own, text in pieces if is_own)
    if any(is_own for is_own, _ in pieces) and not own.strip():
        return valid_card(theirs)
    written = _Written.found_in(own or their_text)
    header, written.keys = _merge_header(their_raw, written.keys, our_header)
    our_block, written.sections = _merge_sections(own, written.sections, our_block)
    our_block = _RECORD.sub(lambda _: str(written), our_block, count=1)
    kept = [(is_own, text) for is_own, text in pieces if is_own or not _RECORD.match(text)]
    # Without anything in it, two rules would be no header but text.
    top = f"---\n{header}---\n" if header else ""
    return top + _merge_text(kept, our_block)


def valid_card(card: str) -> str:
    """A card that the Hub takes: as it is, but a header that is no mapping of YAML becomes text, an empty one goes."""
    raw, text = _split(card)
    return card if _load(raw) else text


# ---- Text ----


def _merge_sections(theirs: str, written: list[str], ours: str) -> tuple[str, list[str]]:
    """Our block without the sections that were deleted by hand, and the headings to remember."""
    parts = re.split(r"^(?=## )", ours.removesuffix(f"{END}\n"), flags=re.MULTILINE)
    there = _headings(theirs)
    deleted = [heading for heading in written if heading not in there] if theirs else []
    block = "".join(part for part in parts if part.partition("\n")[0].strip() not in deleted)
    return f"{block.rstrip()}\n\n{END}\n", [*deleted, *_headings(block)]


def _headings(text: str) -> list[str]:
    return [heading.strip() for heading in _HEADING.findall(text)]


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


def _merge_header(raw: str, written: dict[str, str], ours: Header) -> tuple[str, dict[str, str]]:
    """The merged header's YAML, and the digests to remember, by key."""
    theirs = _load(raw) or {}
    # What we wrote and is not there any more was deleted by hand; what was changed by hand is the user's.
    is_ours = {
        key: _digest(theirs[key]) == written.get(key) if key in theirs else key not in written
        for key in [*ours, *written]
    }
    own = {key: value for key, value in ours.items() if is_ours[key]}
    # The user's keys as they stand, for the sake of comments and layout; if that changes their meaning, anew.
    kept = {key: value for key, value in theirs.items() if not is_ours.get(key)}
    chunks = [text for key, text in _chunks(raw) if key is None or key in kept]
    text = (_dump(own) if own else "") + "".join(chunks)
    merged = own | kept
    remembered = {key: digest for key, digest in written.items() if not is_ours[key]}
    digests = remembered | {key: _digest(value) for key, value in own.items()}
    return text if _load(text) == merged else _dump(merged) if merged else "", digests


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


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _dump(header: Header) -> str:
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
