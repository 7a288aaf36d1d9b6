"""The merged arguments of a run as YAML: a recipe that makes the same run again."""

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import transformers
import yaml

from hf_recycle import __version__
from hf_recycle.hub.scrub import Secrets
from hf_recycle.runs.launcher import LAUNCH_WORDS
from hf_recycle.runs.parse import ARGUMENT_CLASSES, RunArguments
from hf_recycle.utils.recipe_files import recipe_root
from hf_recycle.utils.whole_files import write_bytes
from hf_recycle.utils.yaml_loader import RecipeDumper

CONFIG_FILE = "config.yaml"
"""Lies in a run's folder, and is not published: it holds paths of this machine. The card has the arguments."""

_SECRET = re.compile(r".*(token|password|secret|api_key)")
_HEADER = """\
# A run of hf-recycle {package}, transformers {transformers}. What is not named here has its default.
# The same run once more: hf-recycle train config.yaml --output_dir ANOTHER{launch}
"""


def configuration_text(arguments: RunArguments) -> str:
    """All arguments, those that were given first, each with its source. As a recipe it makes the same run."""
    rows = [(_line(name, value), _source(arguments.sources[name])) for name, value in _given(arguments).items()]
    for cls in ARGUMENT_CLASSES:
        defaults = {item.name: _default(item) for item in fields(cls) if item.init and item.name not in arguments.given}
        rows += [(_line(name, value), "default") for name, value in defaults.items()]
    width = min(max(len(line) for line, _ in rows), 60)
    return _without_tokens("\n".join(f"{line:{width}}  # {source}" for line, source in rows), arguments)


def save_configuration(arguments: RunArguments, folder: Path) -> None:
    """Writes what was given, except where to resume from, as `config.yaml` of a run's folder; its first lines tell the
    command that runs it again, on as many processes."""
    given = {name: value for name, value in _given(arguments).items() if name != "resume_from_checkpoint"}
    launch = f" {words}" if (words := os.environ.get(LAUNCH_WORDS)) else ""
    text = _HEADER.format(package=__version__, transformers=transformers.__version__, launch=launch)
    text += "".join(f"{_line(name, value)}\n" for name, value in given.items())
    write_bytes(folder / CONFIG_FILE, _without_tokens(text, arguments).encode("utf-8"))


def _given(arguments: RunArguments) -> Mapping[str, Any]:
    return {name: value for name, value in arguments.given.items() if not _SECRET.fullmatch(name)}


def _line(name: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = yaml.dump([value], Dumper=RecipeDumper, default_flow_style=True, width=2**31, allow_unicode=True)
    return f"{name}: {text.strip()[1:-1]}"


def _default(item: Field) -> Any:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return getattr(value, "value", value)


def _source(source: str) -> str:
    path = Path(source)
    if path.is_relative_to(recipe_root()):
        return f"recipe {path.relative_to(recipe_root()).with_suffix('')}"
    return f"recipe {source}" if path.suffix else source


def _without_tokens(text: str, arguments: RunArguments) -> str:
    return Secrets.of_this_machine(arguments.training.hub_token).without_tokens(text)
