"""Checks on a model's configuration of unknown origin, before transformers makes lists and layers of its numbers."""

import json
import re
from pathlib import Path
from typing import Any

from hf_recycle.hub.checks.sizes import small_file_problem

# Layers and experts become modules, one by one; labels become entries of dictionaries.
_MODULES = re.compile(r".*(layer|block|depth|stage).*")
_EXPERTS = re.compile(r".*expert.*")
_COUNTS = re.compile(r"(num|n)_.*")
_OTHER = re.compile(r".*(_id|_ids|_size|_dim|_idx|_index|_eps|_theta|param|token|step|sample|position|byte|channel).*")
_MAX_MODULES = 2_000
_MAX_EXPERTS = 20_000
_MAX_COUNT = 1_000_000


def configuration_problem(path: Path) -> str | None:
    """What is wrong with a `config.json`, in a clause; None if it can be given to transformers."""
    if problem := small_file_problem("config.json", path.stat().st_size):
        return problem
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"it can't be read as JSON ({type(error).__name__})"
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__} where an object is expected"
    return _problem(content)


def _problem(content: dict[str, Any]) -> str | None:
    for key, value in content.items():
        if isinstance(value, dict):  # the configuration of a part, or of what else
            if problem := _problem(value):
                return problem
            continue
        if _OTHER.fullmatch(key):
            continue
        limits = ((_MODULES, _MAX_MODULES), (_EXPERTS, _MAX_EXPERTS), (_COUNTS, _MAX_COUNT))
        most = next((limit for names, limit in limits if names.fullmatch(key)), None)
        items = value if isinstance(value, list) else [value]
        numbers = [len(items), *(item for item in items if type(item) in (int, float))]
        if most is not None and not all(-most <= number <= most for number in numbers):
            return f"its {key} is {value!r:.40}, more than any model has"
    return None
