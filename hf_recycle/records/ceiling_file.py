"""`recycling_ceiling.json`: what `hf-recycle analyze --ceiling --card` found in the model of a folder, for its card."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_recycle.records.files import STATS_FILE, read_json, write_json

CEILING_FILE = "recycling_ceiling.json"

_OF_BLOCKS = ("neurons", "dead", "dormant", "duplicate", "cost", "sd")
_OF_CURVES = ("share", "loss", "cost", "sd", "parameters", "flops")
_MAX_BYTES = 4 * 2**20
_MAX_ROWS, _MAX_TEXT = 10_000, 1000


def write_ceiling(folder: Path, ceiling: Mapping[str, Any]) -> None:
    """Writes what was found, `Ceiling.to_json()` without the indices of neurons, and what tells the model it is of."""
    blocks = [{key: value for key, value in row.items() if key != "indices"} for row in ceiling["blocks"]]
    write_json(folder / CEILING_FILE, {**ceiling, "blocks": blocks, "found_in": _model_of(folder)})


def read_ceiling(folder: Path | None) -> dict[str, Any] | None:
    """What the card and its figure tell of it: `text`, `verdict` (its sentences), `blocks` and `curve`.

    None if the folder has no such file, or one that can't be read or was found in another model, before the training
    went on, say.
    """
    path = None if folder is None else folder / CEILING_FILE
    try:
        if folder is None or path is None or path.stat().st_size > _MAX_BYTES:
            return None
        content = read_json(path)
        if content["found_in"] != _model_of(folder):
            return None
        return {
            "text": _text(content["text"]),
            "verdict": [_text(sentence) for sentence in _rows(content["verdict"]["sentences"])],
            "blocks": [
                {"name": _text(row["name"]), **{name: _number(row[name]) for name in _OF_BLOCKS}}
                for row in _rows(content["blocks"])
            ],
            "curve": [{name: _number(row[name]) for name in _OF_CURVES} for row in _rows(content["curve"])],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _model_of(folder: Path) -> str:
    """Tells one state of a model from another: the summary holds its magnitudes and its losses."""
    return hashlib.sha256((folder / STATS_FILE).read_bytes()).hexdigest()


def _rows(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_ROWS:
        raise ValueError("no list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError("no text")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("no number")
    return value
