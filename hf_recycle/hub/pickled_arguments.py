"""`training_args.bin` without secrets.

It is a pickle of the user's own, but a folder to be published may come from elsewhere: it is read with PyTorch's
restricted unpickler, which is shown nothing but the classes that training arguments are made of.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from hf_recycle.hub.scrub import is_private

_LIBRARIES = ("transformers", "accelerate", "hf_recycle")


def scrub_arguments(data: bytes, scrub: Callable[[str], str]) -> bytes:
    """The same arguments, pickled anew, with every text scrubbed and what is private left out.

    Args:
        data: the content of a `training_args.bin`.
        scrub: what makes of a text one that may be published.

    Raises:
        Exception: of many kinds, if it holds anything but training arguments.
    """
    with torch.serialization.safe_globals(_known_classes(data)):
        arguments = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(arguments, TrainingArguments):
        raise TypeError(f"{type(arguments).__name__} where training arguments are expected")
    for name, value in vars(arguments).items():
        private = is_private(name) and not name.endswith("_dir")
        vars(arguments)[name] = None if private else _scrubbed(value, scrub)
    buffer = io.BytesIO()
    torch.save(arguments, buffer)
    return buffer.getvalue()


def _known_classes(data: bytes) -> list[type]:
    """The classes that the pickle names, as far as they are kinds of argument of these libraries or loaded already."""
    found = []
    for path in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
        module, _, name = path.rpartition(".")
        if module.split(".")[0] in _LIBRARIES:  # `hf-recycle push` has loaded few of their modules
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        value = getattr(sys.modules.get(module), name, None)
        if isinstance(value, type) and (
            issubclass(value, TrainingArguments) or (module.split(".")[0] in _LIBRARIES and _is_argument(value))
        ):
            found.append(value)
    return found


def _is_argument(cls: type) -> bool:
    return is_dataclass(cls) or issubclass(cls, Enum | PartialState) or cls.__name__.endswith("Config")


def _scrubbed(value: Any, scrub: Callable[[str], str]) -> Any:
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: None if is_private(str(key)) else _scrubbed(item, scrub) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_scrubbed(item, scrub) for item in value)
    if isinstance(value, PartialState):
        return None  # the state of processes that are gone, with their addresses
    if hasattr(value, "__dict__") and type(value).__module__.split(".")[0] in _LIBRARIES:
        for name, item in vars(value).items():
            vars(value)[name] = _scrubbed(item, scrub)
    return value
