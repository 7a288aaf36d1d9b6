"""Changes to a model's configuration, written "hidden_size=128,num_hidden_layers=2"."""

from typing import Any

import yaml
from transformers import PreTrainedConfig

from hf_recycle.errors import UserError
from hf_recycle.utils.suggest import nearest
from hf_recycle.utils.yaml_loader import RecipeLoader


def parse_overrides(text: str) -> dict[str, Any]:
    """The changes as written, values read as in a recipe: numbers, true/false, null or words.

    Raises:
        UserError: a part without "=", or a key given twice.
    """
    changes: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise UserError(
                f"config_overrides={text!r}: {part!r} is not of the form key=value; write 'hidden_size=128'"
            )
        if key in changes:
            raise UserError(f"config_overrides={text!r} sets {key} twice; keep one of them")
        changes[key] = yaml.load(value, RecipeLoader)
    return changes


def apply_overrides(config: PreTrainedConfig, changes: dict[str, Any]) -> None:
    """Set the changes on `config`, each with the type that its current value has.

    Raises:
        UserError: an unknown key, with the nearest known one, or a value of another type.
    """
    known = {*config.to_dict(), *config.attribute_map} - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    for key, value in changes.items():
        if key not in known:
            raise UserError(
                f"config_overrides: a {config.model_type} configuration has no {key}; {nearest(key, known)}"
            )
        setattr(config, key, _typed(key, value, getattr(config, key, None)))


def _typed(key: str, value: Any, current: Any) -> Any:
    if current is None or value is None:
        return value
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(current, int) and not isinstance(current, bool) and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not type(current):
        raise UserError(
            f"config_overrides: {key}={value!r} is not of the type of its default {current!r} "
            f"({type(current).__name__}); write it as one"
        )
    return value
