"""`hf-recycle train`: a run from recipes and arguments."""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from hf_recycle.errors import UserError
from hf_recycle.runs.launcher import LAUNCH_OPTIONS, LAUNCH_WORDS, add_launch_arguments, launch, launch_options
from hf_recycle.runs.recipes import describe_recipes, load_recipes, recipe_completions
from hf_recycle.runs.run_arguments import add_run_arguments, add_trainer_arguments
from hf_recycle.utils.command_line import Parser, completed_by
from hf_recycle.utils.command_words import without

HELP = "Pretrain a model with neuron recycling, from recipes and arguments."

_DESCRIPTION = """\
Pretrain a model with neuron recycling. A recipe is a YAML file of arguments, named by its path or, when it comes with
the package, by a short name. Several are merged left to right; arguments win over recipes, and null takes one back to
its default.

  hf-recycle train demo                                           a small run, minutes on a laptop
  hf-recycle train scale/laptop plain --seed 1                    one recipe for the scale, one for the method
  hf-recycle train demo --resume_from_checkpoint true             start, or go on where the last checkpoint was made
  hf-recycle train runs/demo/config.yaml --output_dir runs/again  the same run once more"""


def add_arguments(parser: Parser, *, everything: bool = False) -> None:
    """Adds the arguments of a run; with `everything` the help lists those of the Trainer too."""
    parser.usage = "hf-recycle train [RECIPE ...] [--argument VALUE ...]"
    parser.description = _DESCRIPTION
    recipes = parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="A file, or the name of a packaged one.")
    completed_by(recipes, recipe_completions)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="List the packaged recipes and exit.")
    instead.add_argument(
        "--help-all", action=_HelpAll, help="Show this help and the arguments of the Trainer, and exit."
    )
    instead.add_argument(
        "--print_config",
        action="store_true",
        help="Print the merged arguments as YAML, with the source of every value, and exit.",
    )
    instead.add_argument(
        "--dry_run",
        action="store_true",
        help="Prepare the data, which stays in the cache, say what would be trained on what, when, and in how much "
        "memory, and exit.",
    )
    add_launch_arguments(parser)
    training = add_run_arguments(parser)
    if everything:
        parser.add_later = None
        add_trainer_arguments(training, shown=True)


class _HelpAll(argparse.Action):
    """Prints the help with the arguments of `TrainingArguments`, and exits."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        full = Parser(prog=parser.prog)
        add_arguments(full, everything=True)
        full.print_help()
        parser.exit()


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit status.

    Raises:
        UserError: what the user can mend.
        KeyboardInterrupt: after a message that says how to go on.
    """
    if options.list:
        print(describe_recipes())
        return 0
    if not options.words:
        raise UserError("name a recipe, such as demo: hf-recycle train --list lists them, --help the arguments")
    launched_by = launch_options(options)
    telling = options.print_config or options.dry_run
    if _has_stages(options) and not telling and not os.environ.get(LAUNCH_WORDS):
        return _train_stages(options, launched_by)
    if launched_by and not options.print_config:
        return launch(launched_by, without(options.words, LAUNCH_OPTIONS))
    return _train(options)


def _has_stages(options: argparse.Namespace) -> bool:
    if hasattr(options, "ff_stages"):
        return options.ff_stages is not None
    return load_recipes(options.recipes).values.get("ff_stages") is not None


def _train_stages(options: argparse.Namespace, launched_by: dict[str, Any]) -> int:
    from hf_recycle.cli.stages import train_in_stages

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "ff_stages are launched one after another by hf-recycle train itself: start it with --accelerate_config in "
            "place of accelerate launch or torchrun"
        )

    def train(checkpoint: str | None) -> int:
        words = without(options.words, ["resume_from_checkpoint"])
        if checkpoint is not None:
            words = [*words, "--resume_from_checkpoint", checkpoint]
        if launched_by:
            return launch(launched_by, without(words, LAUNCH_OPTIONS))
        return _train(options, {"resume_from_checkpoint": checkpoint})

    with _bad_values_are_user_errors():
        from hf_recycle.runs.parse import merge, run_flags

        arguments = merge(options.recipes, run_flags(options))
    return train_in_stages(arguments, train)


def _train(options: argparse.Namespace, more: Mapping[str, Any] = MappingProxyType({})) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log has each loss when it is known, not when a buffer is full
    run = None
    try:
        with _bad_values_are_user_errors():
            # Imported late: importing torch takes seconds, and what is above does without it.
            from hf_recycle.runs.parse import merge, run_flags

            arguments = merge(options.recipes, run_flags(options) | dict(more))
            if options.print_config or options.dry_run:
                _tell(arguments, options)
                return 0
            from hf_recycle.runs.run import Run

            run = Run.prepare(arguments, options.words, quiet=options.quiet)
        run.train()
        # Processes that just exit while others still work may die in the threads of their process group.
        run.trainer.end()
    except KeyboardInterrupt:
        if _speaks():
            how = run.how_to_go_on(options.words) if run is not None else "nothing was trained yet"
            print(f"\nstopped; {how}", file=sys.stderr)
        raise
    return 0


def _tell(arguments, options: argparse.Namespace) -> None:
    if options.print_config:
        from hf_recycle.runs.configuration import configuration_text

        text = configuration_text(arguments)
    else:
        from hf_recycle.runs.dry_run import dry_run

        text = dry_run(arguments)
    if _speaks():
        print(text)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _bad_values_are_user_errors() -> Iterator[None]:
    """Before training starts a ValueError is about an argument: those of transformers are ValueErrors too."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
