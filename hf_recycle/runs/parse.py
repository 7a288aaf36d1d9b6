"""Recipes and flags to typed arguments: flags win over recipes, what is unknown is refused."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.errors import UserError
from hf_recycle.runs.recipes import load_recipes, run_name
from hf_recycle.runs.run_arguments import add_run_arguments, kind_of, takes_mapping
from hf_recycle.utils.command_line import Parser
from hf_recycle.utils.suggest import nearest

ARGUMENT_CLASSES = (ModelArguments, DataArguments, RecyclingArguments)
COMMAND_LINE, BY_RECIPES = "command line", "default, named after the recipes"


@dataclass(frozen=True)
class RunArguments:
    """Everything that defines a run, and where it comes from.

    Attributes:
        recipes: their names, as they were given.
        given: what the recipes and the command line say, merged.
        sources: where each of it comes from: the file of a recipe, or the command line.
    """

    model: ModelArguments
    data: DataArguments
    training: RecyclingArguments
    recipes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def parse_run(argv: Sequence[str]) -> RunArguments:
    """Parse `RECIPE ... --argument value ...`.

    Raises:
        UserError: an unknown recipe, key or flag (with the nearest known one), or a value of the wrong type.
        ValueError: a value that the argument classes refuse.
    """
    parser = Parser(prog="hf-recycle train", add_help=False)
    parser.add_argument("recipes", nargs="*")
    add_run_arguments(parser)
    options = parser.parse_args(argv)
    return merge(options.recipes, run_flags(options))


def run_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Those of a command's options that are arguments of a run; None is null, which takes one back to its default."""
    known = _hints()
    given = {name: value for name, value in vars(options).items() if name in known}
    return {name: None if value == [None] else value for name, value in given.items()}


def merge(recipes: Sequence[str], flags: Mapping[str, Any]) -> RunArguments:
    """The arguments of recipes and of flags, which win.

    Raises:
        UserError: an unknown recipe or key (with the nearest known one), or a value of the wrong type.
        ValueError: a value that the argument classes refuse.
    """
    given, sources = _recipe_values(recipes, skip=flags)
    preset = flags.get("preset", given.get("preset"))
    if preset is not None:
        given, sources = _recipe_values([f"preset/{preset}", *recipes], skip=flags)
    given |= flags
    sources |= dict.fromkeys(flags, COMMAND_LINE)
    given.pop("preset", None)  # its values are there, each with its source
    given = {name: value for name, value in given.items() if value is not None}
    if "output_dir" not in given:
        given["output_dir"], sources["output_dir"] = f"runs/{run_name(recipes)}", BY_RECIPES
    model, data, training = [_made(cls, given, sources) for cls in ARGUMENT_CLASSES]
    return RunArguments(model, data, training, tuple(recipes), given, sources)


def _made(cls: Any, given: Mapping[str, Any], sources: Mapping[str, str]) -> Any:
    """An object of an argument class; a value that it refuses is refused with the recipe that it comes from."""
    try:
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given})
    except ValueError as error:
        # Messages begin with the name of the argument.
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        if sources.get(name, COMMAND_LINE) in (COMMAND_LINE, BY_RECIPES):
            raise
        raise type(error)(f"recipe {sources[name]}: {error}") from error


def _hints() -> dict[str, Any]:
    """The types of all arguments, by name."""
    return {
        item.name: hints[item.name]
        for cls in ARGUMENT_CLASSES
        for hints in [get_type_hints(cls)]
        for item in fields(cls)
        if item.init
    }


def _recipe_values(recipes: Sequence[str], skip: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the recipes say but flags don't, read as on the command line, and the file of each."""
    recipe = load_recipes(recipes)
    parser = Parser(add_help=False)
    add_run_arguments(parser, shown=False)
    hints = _hints()
    values: dict[str, Any] = {}
    for key, value in recipe.values.items():
        where = f"recipe {recipe.sources[key]}"
        if key not in hints:
            hint = nearest(key, hints)
            raise UserError(
                f"{where}: unknown argument {key}; "
                + (hint if hint.startswith("did") else "hf-recycle train --help-all lists the known ones")
            )
        if value is None or key in skip:
            continue
        if value == [] and kind_of(hints[key])[1]:  # which no words can say
            values[key] = value
            continue
        words = _words(where, key, value, hints[key])
        try:
            values |= vars(parser.parse_args(words))
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('argument --')}") from error
    return values, {key: recipe.sources[key] for key in values}


def _words(where: str, key: str, value: Any, hint: Any) -> list[str]:
    """A value of a recipe as the words of a command line."""
    kind, many = kind_of(hint)
    if isinstance(value, list):
        if not many:
            raise UserError(f"{where}: {key}={value!r} must be one value, not a list")
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        if not takes_mapping(hint):
            raise UserError(f"{where}: {key} takes one value, not the mapping {value!r}; recipes are flat")
        return [f"--{key}={json.dumps(value)}"]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e4 steps
    return [f"--{key}={value}"]
