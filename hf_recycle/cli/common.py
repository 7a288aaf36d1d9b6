"""What all commands share: verbosity, JSON, and errors in one line."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

_LIBRARIES = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
}
_PROGRESS_BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """-q and -v."""
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("-q", "--quiet", action="store_true", help="Say results and errors alone.")
    how_much.add_argument("-v", "--verbose", action="store_true", help="Also say what the libraries say of their work.")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="Print JSON, and nothing else, to stdout.")


def set_verbosity(options: argparse.Namespace) -> None:
    """Has libraries say as much as -q and -v ask for; also those that are imported later, and by processes to come."""
    if not (options.quiet or options.verbose):
        return
    level = "error" if options.quiet else "info"
    for library, variable in _LIBRARIES.items():
        os.environ[variable] = level
        logging.getLogger(library).setLevel(level.upper())
    if options.quiet:
        logging.getLogger("hf_recycle").setLevel(level.upper())


def no_progress_bars_to_come() -> None:
    """Silence those of libraries that are imported from here on, and of processes that are started."""
    os.environ.update(dict.fromkeys(_PROGRESS_BARS, "1"))


def no_progress_bars() -> None:
    """Silence those of transformers and datasets: they are gone before they can be read."""
    no_progress_bars_to_come()
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def print_result(options: argparse.Namespace, content: Any, text: Callable[[], str]) -> None:
    """Print `content` as JSON where --json asks for it, or `text()`."""
    print(json.dumps(_finite(content), indent=2, ensure_ascii=False) if options.json else text())


def _finite(value: Any) -> Any:
    """`value` with null for what is not finite, such as a loss that diverged: JSON has no word for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def complain(error: Exception) -> int:
    """Say what is wrong in one line on stderr; returns the exit status 2."""
    # Every process of a launch meets the same mistake; one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
