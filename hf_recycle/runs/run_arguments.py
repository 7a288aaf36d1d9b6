"""The arguments of a run as flags, one for each field of four dataclasses: model, data, methods and Trainer."""

import argparse
import ast
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.methods.arguments import OwnArguments
from hf_recycle.utils.command_line import Parser, completed_by
from hf_recycle.utils.registry import Registry
from hf_recycle.utils.suggest import nearest

_GROUPS = {"model": ModelArguments, "data": DataArguments, "methods": OwnArguments}
_TRAINING = """\
those of transformers.TrainingArguments: --output_dir (runs/RECIPE by default), --max_steps, --learning_rate,
--per_device_train_batch_size, --seed, ...; --help-all lists them"""
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def add_run_arguments(parser: Parser, *, shown: bool = True) -> Any:
    """Adds a flag for every argument of a run. A namespace holds those alone that are given; null is None.

    The Trainer's own come with transformers, which takes seconds to import: they are added when words are parsed.

    Args:
        shown: whether the help lists them.

    Returns:
        The group of the Trainer's arguments.
    """
    completing = "_ARGCOMPLETE" in os.environ
    shown = shown or completing
    for title, cls in _GROUPS.items():
        add_fields(parser.add_argument_group(title) if shown else parser, cls, shown=shown)
    group = parser.add_argument_group("training", _TRAINING) if shown else parser
    if completing:
        _add_trainer_names(group)
    else:
        parser.add_later = lambda: add_trainer_arguments(group)
    return group


def add_trainer_arguments(group: Any, *, shown: bool = False) -> None:
    """Adds a flag for every argument of `transformers.TrainingArguments`, which is imported."""
    from hf_recycle.arguments import RecyclingArguments

    add_fields(group, RecyclingArguments, shown=shown, without=OwnArguments)


def add_fields(group: Any, cls: type, *, shown: bool = True, without: type | None = None) -> None:
    """Adds a flag for every field of a dataclass that a word can set; its metadata may hold `help` and `choices`.

    Args:
        without: a dataclass whose fields are left out.
    """
    hints = get_type_hints(cls)
    left_out = {item.name for item in fields(without)} if without else set()
    for item in fields(cls):
        kind, many = kind_of(hints[item.name])
        if not item.init or kind is None or item.name in left_out:
            continue
        choices = _choices(item, hints[item.name])
        action = group.add_argument(
            f"--{item.name}",
            type=_reader(kind, choices),
            nargs="+" if many else "?" if kind is bool else None,
            const=True if kind is bool else None,
            default=argparse.SUPPRESS,
            metavar=_metavar(choices),
            help=_help(item, choices) if shown else argparse.SUPPRESS,
        )
        if names := choices or (["true", "false"] if kind is bool else []):
            completed_by(action, partial(_always, names))
        if item.default is True:
            off = {"action": "store_false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no_{item.name}", dest=item.name, **off)


def kind_of(hint: Any) -> tuple[Any, bool]:
    """What a word is read as for an argument of this type, None if it can't be, and whether there may be several."""
    kinds = {_plain(kind): kind for kind in _kinds(hint)}
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
        return str, False
    if list in kinds and str not in kinds:
        return get_args(kinds[list])[0], True
    return next((kind for kind in (bool, float, int, str, dict) if kind in kinds), None), False


def takes_mapping(hint: Any) -> bool:
    """Whether an argument of this type takes a mapping, on the command line as JSON."""
    return dict in map(_plain, _kinds(hint))


def _kinds(hint: Any) -> Sequence[Any]:
    return (get_args(hint) or (hint,)) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)


def _plain(kind: Any) -> Any:
    return get_origin(kind) or kind


def _choices(item: Field, hint: Any) -> list[str]:
    """The names that an argument takes; none if there is no end of them."""
    named = item.metadata.get("choices", ())
    if isinstance(named, Registry):
        return named.names()
    enums = [kind for kind in _kinds(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return list(named) or [member.value for kind in enums for member in kind]


def _reader(kind: Any, choices: Sequence[str]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text == "null":  # as in a recipe: the default
            return None
        if kind is bool:
            if text.lower() not in _BOOLEANS:
                raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
            return _BOOLEANS[text.lower()]
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {nearest(text, choices, show_all=True)}")
        return json.loads(text) if kind is dict else kind(text)

    read.__name__ = "JSON" if kind is dict else kind.__name__  # argparse says "invalid float value"
    return read


def _metavar(choices: Sequence[str]) -> str | None:
    """The choices where there is room for them; None: the type."""
    listed = "{" + ",".join(choices) + "}"
    return None if not choices else listed if len(listed) <= 40 else "NAME"


def _help(item: Field, choices: Sequence[str]) -> str:
    text = " ".join(str(item.metadata.get("help", "")).split())
    if choices and not all(name in text for name in choices):
        text += f" One of {', '.join(choices)}."
    default = None if item.default is MISSING else getattr(item.default, "value", item.default)
    if default not in (None, "", False):
        text = f"{text.rstrip('.')} (default: {default})."
    return text.replace("%", "%%")


def _always(names: Sequence[str], prefix: str) -> Sequence[str]:
    return names


def _add_trainer_names(group: Any) -> None:
    """Adds the names of the Trainer's arguments alone, read from the source of transformers: for a shell that waits."""
    spec = find_spec("transformers")
    assert spec is not None
    source = Path(str(spec.origin)).with_name("training_args.py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            for name in (target.id for target in targets if isinstance(target, ast.Name)):
                if not name.startswith("_"):
                    group.add_argument(f"--{name}", default=argparse.SUPPRESS, nargs="?")
