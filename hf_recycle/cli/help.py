"""The help of `hf-recycle train`: our own arguments first, the Trainer's on demand."""

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.runs.launcher import LAUNCH_OPTIONS

_INTRODUCTION = """\
usage: hf-recycle train [RECIPE ...] [--argument VALUE ...]

Pretrain a model with neuron recycling. A recipe is a YAML file of arguments, named by its path or, when it
comes with the package, by a short name. Several are merged left to right; arguments win over recipes.

  hf-recycle train demo                               a small run, minutes on a laptop
  hf-recycle train scale/laptop plain --seed 1        one recipe for the scale, one for the method
  hf-recycle train demo --resume_from_checkpoint true start, or go on where the last checkpoint was made

  --list       the packaged recipes
  --help       this text
  --help-all   this text and the arguments of transformers.TrainingArguments
"""
_TRAINING_NOTE = """\
Training arguments are those of transformers.TrainingArguments: --output_dir (runs/<recipe> by default),
--max_steps, --learning_rate, --per_device_train_batch_size, --seed, ... See --help-all.
"""


def help_text(everything: bool = False) -> str:
    """The help, with the arguments of `TrainingArguments` when `everything` is asked for."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(RecyclingArguments) if field.name not in inherited]
    parts = [
        _INTRODUCTION,
        _launching(),
        _group("Model", ModelArguments, dataclasses.fields(ModelArguments)),
        _group("Data", DataArguments, dataclasses.fields(DataArguments)),
        _group("Method", RecyclingArguments, own),
    ]
    if everything:
        rest = [field for field in dataclasses.fields(RecyclingArguments) if field.name in inherited and field.init]
        parts.append(_group("Training (transformers.TrainingArguments)", RecyclingArguments, rest))
    else:
        parts.append(_TRAINING_NOTE)
    return "\n".join(parts)


def _launching() -> str:
    entries = (f"  --{name} VALUE\n      {text}" for name, text in LAUNCH_OPTIONS.items())
    return "\n".join(["Several processes:", *entries, ""])


def _group(title: str, cls: type, fields: Iterable[Any]) -> str:
    hints = get_type_hints(cls)
    return "\n".join([f"{title}:", *(_entry(field, hints[field.name]) for field in fields), ""])


def _entry(field: Any, hint: Any) -> str:
    text = " ".join(str(field.metadata.get("help", "")).split())
    default = _default(field)
    if default is not None:
        text = f"{text} (default: {default})".strip()
    head = f"  --{field.name} {_kind(field, hint)}"
    return head + "\n" + textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(field: Any) -> object:
    if field.default is dataclasses.MISSING or field.default == "":
        return None
    return getattr(field.default, "value", field.default)


def _kind(field: Any, hint: Any) -> str:
    """What is written after the name: the choices, or the type in capitals."""
    choices = field.metadata.get("choices") or (get_args(hint) if get_origin(hint) is Literal else None)
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    types = [option for option in (get_args(hint) or (hint,)) if option is not type(None)]
    if get_origin(hint) is list:
        types = [hint]
    first = types[0]
    if bool in types:
        return "[false]" if field.default is True else "[true]"
    if get_origin(first) is list:
        return f"{get_args(first)[0].__name__.upper()} ..."
    return getattr(first, "__name__", "VALUE").upper() if first in (int, float, str) else "VALUE"
