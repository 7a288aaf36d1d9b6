"""Recipes and flags to typed arguments: flags win over recipes, what is unknown is refused."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.errors import UserError
from hf_recycle.runs.launcher import LAUNCH_OPTIONS
from hf_recycle.runs.recipes import Recipe, load_recipes, run_name
from hf_recycle.utils.suggest import nearest

ARGUMENT_CLASSES = (ModelArguments, DataArguments, RecyclingArguments)


@dataclass(frozen=True)
class RunArguments:
    """Everything that defines a run, and the recipes it was made from."""

    model: ModelArguments
    data: DataArguments
    training: RecyclingArguments
    recipes: tuple[str, ...] = ()


def parse_run(argv: Sequence[str]) -> RunArguments:
    """Parse `RECIPE ... --argument value ...`.

    Raises:
        UserError: an unknown recipe, key or flag (with the nearest known one), or a value of the wrong type.
        ValueError: a value that the argument classes refuse.
    """
    names, words = _split(argv)
    parser = _parser()
    flags = _read_flags(parser, words)
    recipe = load_recipes(names)
    tokens = _recipe_tokens(parser, recipe, skip=set(flags))
    for given in flags.values():
        # As in a recipe, null means the default.
        if given[1:] != ["null"] and not given[0].endswith("=null"):
            tokens += given
    namespace = _parse(parser, tokens, recipe, flags)
    if getattr(namespace, "output_dir", None) is None:
        namespace.output_dir = f"runs/{run_name(names)}"
    model, data, training = (_instance(cls, namespace) for cls in ARGUMENT_CLASSES)
    return RunArguments(model, data, training, tuple(names))


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Recipes, which come first, and flags."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return list(argv[:count]), list(argv[count:])


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        """Raise where argparse would print its usage, 400 lines here, and exit."""
        raise UserError(message)


def _parser() -> _Parser:
    parser = _Parser(ARGUMENT_CLASSES, add_help=False, allow_abbrev=False, exit_on_error=False)
    for action in parser._actions:
        # HfArgumentParser leaves dict[str, bool] as the type, which no string can be turned into.
        if get_origin(action.type) is dict or action.type is dict:
            action.type = json.loads
    return parser


def _read_flags(parser: _Parser, words: list[str]) -> dict[str, list[str]]:
    """Flags by the argument they set, each as words for argparse; of a repeated one the last counts."""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            action = parser._option_string_actions.get(name)
            if action is None:
                known = {option for option in parser._option_string_actions if "-" not in option[2:]}
                known |= {f"--{option}" for option in LAUNCH_OPTIONS}
                raise UserError(
                    f"unknown argument {name}; {_hint(name.replace('-', '_').replace('__', '--', 1), known)}"
                )
            # "--name=value" stays one word: its value may begin with a dash.
            current = [word] if equals else [name]
            flags[action.dest] = current
        elif word.startswith("-") and not _is_number(word):
            raise UserError(f"unknown argument {word}; arguments begin with two dashes")
        elif current is None:
            raise UserError(f"unexpected {word!r}; recipes go before the arguments")
        else:
            current.append(word)
    for given in flags.values():
        action = parser._option_string_actions[given[0].partition("=")[0]]
        most = 0 if action.nargs == 0 else 1
        extra = given[1 if "=" in given[0] else 1 + most :]
        if extra and action.nargs != "+":
            raise UserError(f"unexpected {extra[0]!r} after {given[0]}; recipes go before the arguments")
    return flags


def _recipe_tokens(parser: _Parser, recipe: Recipe, skip: set[str]) -> list[str]:
    """The recipes' arguments as words for argparse, without those that flags set."""
    takes_mapping = _mapping_arguments()
    actions = {action.dest: action for action in parser._actions if not action.option_strings[0].startswith("--no_")}
    tokens: list[str] = []
    for key, value in recipe.values.items():
        where = f"recipe {recipe.sources[key]}"
        if key not in actions:
            raise UserError(f"{where}: unknown argument {key}; {_hint(key, actions)}")
        if value is None or key in skip:
            continue
        action = actions[key]
        if isinstance(value, list):
            if action.nargs != "+":
                raise UserError(f"{where}: {key}={value!r} must be one value, not a list")
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            if key not in takes_mapping:
                raise UserError(f"{where}: {key} takes one value, not the mapping {value!r}; recipes are flat")
            tokens.append(f"--{key}={json.dumps(value)}")
        else:
            tokens.append(f"--{key}={_as_word(value, action)}")
    return tokens


def _as_word(value: object, action: argparse.Action) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and action.type is int and value.is_integer():
        return str(int(value))  # 1e4 steps
    return str(value)


def _parse(parser: _Parser, tokens: list[str], recipe: Recipe, flags: dict[str, list[str]]) -> argparse.Namespace:
    try:
        namespace, rest = parser.parse_known_args(tokens)
    except argparse.ArgumentError as error:
        option = (error.argument_name or "").partition("/")[0].removeprefix("--")
        source = f"recipe {recipe.sources[option]}: " if option in recipe.sources and option not in flags else ""
        raise UserError(f"{source}argument {option}: {error.message}") from error
    if rest:
        raise UserError(f"unexpected {rest[0]!r}; recipes go before the arguments")
    return namespace


def _instance(cls: type, namespace: argparse.Namespace) -> Any:
    names = [name for name, spec in cls.__dataclass_fields__.items() if spec.init]
    return cls(**{name: getattr(namespace, name) for name in names})


def _mapping_arguments() -> set[str]:
    """Names of the arguments that take a mapping (on the command line: JSON)."""
    found = set()
    for cls in ARGUMENT_CLASSES:
        for name, hint in get_type_hints(cls).items():
            options = get_args(hint) or (hint,)
            if hint is dict or get_origin(hint) is dict or any(o is dict or get_origin(o) is dict for o in options):
                found.add(name)
    return found


def _hint(name: str, known: Any) -> str:
    text = nearest(name, known)
    return text if text.startswith("did") else "hf-recycle train --help-all lists the known ones"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
