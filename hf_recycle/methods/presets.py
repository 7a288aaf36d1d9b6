"""Presets: settings of methods that go together, as recipes that say why (`recipes/preset/`)."""

from typing import Any

import yaml

from hf_recycle.utils.recipe_files import recipe_root
from hf_recycle.utils.yaml_loader import RecipeLoader

PRESETS = ("article", "recommended")


def preset_values(name: str) -> dict[str, Any]:
    """The arguments of one of `PRESETS`, by name."""
    return yaml.load((recipe_root() / "preset" / f"{name}.yaml").read_text(encoding="utf-8"), RecipeLoader)
