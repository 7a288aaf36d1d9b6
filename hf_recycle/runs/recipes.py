"""Recipes: flat YAML files of arguments, found by path or short name, merged left to right."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_recycle.errors import UserError
from hf_recycle.utils.recipe_files import recipe_root
from hf_recycle.utils.suggest import nearest
from hf_recycle.utils.yaml_loader import RecipeLoader

_SUFFIXES = (".yaml", ".yml")
# Beside the recipes lie files that start processes (`hf_recycle.runs.launcher`), and studies (`hf_recycle.studies`).
_OTHER_FOLDERS = ("accelerate/", "studies/")


@dataclass
class Recipe:
    """Arguments of merged recipes, and the file that each of them comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """Short names of the packaged recipes, such as `demo` and `scale/laptop`."""
    root = recipe_root()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith(_OTHER_FOLDERS))


def describe_recipes() -> str:
    """The packaged recipes, one a line, with what their first comment says."""
    names = recipe_names()
    width = max(map(len, names), default=0)
    return "\n".join(f"{name:{width}}  {_description(recipe_root() / f'{name}.yaml')}".rstrip() for name in names)


def recipe_completions(prefix: str) -> list[str]:
    """What a shell may offer for the name of a recipe: packaged ones, and YAML files and folders."""
    files = (path for path in glob.glob(f"{glob.escape(prefix)}*") if path.endswith(_SUFFIXES))
    folders = (path for path in glob.glob(f"{glob.escape(prefix)}*/"))
    return [*recipe_names(), *files, *folders]


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its path or its short name.

    Raises:
        UserError: there is none; the message names the nearest one and all of them.
    """
    path = Path(name).expanduser()
    if path.suffix in _SUFFIXES and path.is_file():
        return path
    # "recipes/demo.yaml" written far from the checkout means the packaged one.
    short = name.removesuffix(".yaml").removeprefix("recipes/")
    names = recipe_names()
    if short in names:
        return recipe_root() / f"{short}.yaml"
    missing = f"recipe {name!r} is neither a file that ends in .yaml nor the name of a packaged recipe"
    raise UserError(f"{missing}; {nearest(short, names, show_all=True)}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The arguments of one file.

    Raises:
        UserError: it is not a flat YAML mapping of names, or names one twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"recipe {path}: {problem}{where}; write one 'argument: value' a line") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"recipe {path} is not a mapping; write one 'argument: value' a line")
    return values


def load_recipes(names: Sequence[str]) -> Recipe:
    """Merge recipes left to right: a later one wins. A value of null takes an argument back to its default.

    A recipe may begin with the arguments of others: its key `include` names one or a list of them.

    Raises:
        UserError: see `find_recipe` and `read_recipe`; or a recipe that includes itself.
    """
    recipe = Recipe()
    for name in names:
        _merge(recipe, find_recipe(name), ())
    return recipe


def _merge(recipe: Recipe, path: Path, inside: tuple[Path, ...]) -> None:
    """Lay the arguments of `path` over `recipe`, those of the recipes it includes first."""
    if path.resolve() in inside:
        raise UserError(f"recipe {path} includes itself; take its name out of include")
    values = read_recipe(path)
    included = values.pop("include", None) or []
    included = [included] if isinstance(included, str) else included
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise UserError(f"recipe {path}: include={included!r} must be the name of a recipe or a list of names")
    for name in included:
        beside = path.parent / name
        other = beside if beside.suffix in _SUFFIXES and beside.is_file() else find_recipe(name)
        _merge(recipe, other, (*inside, path.resolve()))
    for key, value in values.items():
        recipe.values[key] = value
        recipe.sources[key] = str(path)


def run_name(names: Sequence[str]) -> str:
    """What a run of these recipes is called: `laptop-plain` for `scale/laptop plain`."""
    return "-".join(Path(name).stem for name in names) or "train"


def _description(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""
