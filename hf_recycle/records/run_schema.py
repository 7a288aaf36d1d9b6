"""What `recycling_config.json` may say about a run under its key `run`, checked before it is used or shown."""

import json
import math
from collections.abc import Callable
from typing import Any

_MAX_BYTES = 256 * 2**10
_MAX_ITEMS = 1000
MAX_TEXT = 4000

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float) or _text(value)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= _MAX_ITEMS and all(map(check, value))


def _mapping(check: Check) -> Check:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= _MAX_ITEMS
        and all(map(_text, value))
        and all(map(check, value.values()))
    )


def _object(**checks: Check) -> Check:
    """An object; keys that are not listed may come from a newer version and are left alone."""
    return lambda value: isinstance(value, dict) and all(checks[key](value[key]) for key in checks if key in value)


def _argument(value: Any) -> bool:
    return _scalar(value) or _list(_scalar)(value) or _mapping(lambda v: _scalar(v) or _list(_scalar)(v))(value)


RUN_SCHEMA: dict[str, Check] = {
    "command": _maybe(_text),
    "arguments": _mapping(_argument),  # those that differ from the defaults
    "defaults": _mapping(_argument),  # the others
    "model": _object(architecture=_text, parameters=_count),
    "base_model": _maybe(_object(name=_text, revision=_maybe(_text))),
    "data": _object(name=_maybe(_text), datasets=_list(_text), config=_maybe(_text), files=_list(_text)),
    "tokenizer": _maybe(_object(name=_maybe(_text), vocabulary=_count, mask=_maybe(_text))),
    "card": _mapping(lambda value: _maybe(_text)(value) or _list(_text)(value)),  # what `create_model_card` was told
    "hardware": _object(device=_text, processes=_count, engine=_text, precision=_text),
    "seconds": _maybe(_amount),  # wall time of training, over all resumes
    "tokens": _maybe(_count),  # positions of all training batches, padding included
    "versions": _mapping(_text),
    "unigram_entropy": _maybe(_amount),  # nats
}
"""The keys of `run` and what each may hold; all may be missing."""


def run_problem(run: Any) -> str | None:
    """What is wrong with the facts of a run, for an error message; None if they are fine."""
    if not isinstance(run, dict):
        return f"run is a {type(run).__name__} where an object is expected"
    try:
        # As it is written: infinity is no JSON, and half a character no text.
        size = len(json.dumps(run, allow_nan=False, ensure_ascii=False).encode("utf-8"))
    except (TypeError, ValueError) as error:
        return f"run is not JSON ({error})"
    if size > _MAX_BYTES:
        return f"run takes more than {_MAX_BYTES:,} bytes"
    for key, check in RUN_SCHEMA.items():
        if key in run and not check(run[key]):
            return f"{key} of run has an unexpected type or size"
    return None
