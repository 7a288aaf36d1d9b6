"""The command line: `hf-recycle COMMAND ...`. Nothing heavy is imported before a command asks for it."""

import sys
from collections.abc import Sequence
from importlib import import_module

from hf_recycle.utils.suggest import nearest

# Name -> (module with a `main(argv) -> exit status`, what it does).
_COMMANDS = {
    "train": ("hf_recycle.train", "pretrain a model with neuron recycling, from recipes and arguments"),
    "analyze": (
        "hf_recycle.cli.analyze",
        "measure the feed-forward neurons of trained models: magnitudes, dead neurons, pruning curves",
    ),
    "push": ("hf_recycle.cli.push", "publish a run or a checkpoint on the Hugging Face Hub"),
    "pull": ("hf_recycle.cli.pull", "download a checkpoint of the Hub that training can go on from"),
    "report": ("hf_recycle.cli.report", "draw a run, or a repository of the Hub, as one HTML page"),
    "study": ("hf_recycle.cli.study", "run experiments over seeds and report on them"),
    "shrink": ("hf_recycle.cli.shrink", "take the pruned or the least important neurons out of a model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for what the user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0 if words else 2
    command, rest = words[0], words[1:]
    if command == "--version":
        from importlib.metadata import version

        print(f"hf-recycle {version('hf-recycle')}")
        return 0
    if command not in _COMMANDS:
        print(f"error: unknown command {command!r}; {nearest(command, _COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(_COMMANDS[command][0]).main(rest)


def _help() -> str:
    commands = "".join(f"  {name:<10} {does}\n" for name, (_, does) in _COMMANDS.items())
    return (
        "usage: hf-recycle COMMAND ...\n\nNeuron recycling for transformers.\n\ncommands:\n"
        f"{commands}\n"
        "  --help     this text; after a command, that command's help\n"
        "  --version  the version of the package\n"
    )
