"""What a caller of `create_model_card` tells, as facts of the card."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

Words = Mapping[str, str | list[str] | None]
"""The arguments of the stock Trainer's `create_model_card`, by name."""


def told_facts(words: Words) -> dict[str, Any]:
    """The facts of `card_facts` that the words replace."""
    names, tags, args = (_listed(words.get(key)) for key in ("dataset", "dataset_tags", "dataset_args"))
    datasets = list(zip_longest(names, tags, args))[: max(len(names), len(tags))]
    base = words.get("finetuned_from")
    facts = {
        "name": words.get("model_name"),
        "license": words.get("license"),
        "language": words.get("language"),
        "more_tags": _listed(words.get("tags")),
        "pipeline_tag": next(iter(_listed(words.get("tasks"))), None),
        "base_model": {"name": base, "revision": None} if base else None,
        "datasets": tags,
        "trained_on": [name or tag for name, tag, _ in datasets],
        "evaluated_on": [(name or tag, tag or name, arg) for name, tag, arg in datasets],
    }
    return {name: value for name, value in facts.items() if value}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
