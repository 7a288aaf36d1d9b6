"""The command line: `hf-recycle COMMAND ...`. Nothing heavy is imported before a command asks for it."""

import sys
from collections.abc import Sequence

from hf_recycle.suggest import nearest

_HELP = """\
usage: hf-recycle COMMAND ...

Neuron recycling for transformers.

commands:
  train      pretrain a model with neuron recycling, from recipes and arguments
  push       publish a run or a checkpoint on the Hugging Face Hub
  report     draw a run, or a repository of the Hub, as one HTML page
  pull       download a checkpoint of the Hub that training can go on from

  --help     this text; after a command, that command's help
  --version  the version of the package
"""
_COMMANDS = ("train", "push", "pull", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for what the user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if words else 2
    command, rest = words[0], words[1:]
    if command == "--version":
        from importlib.metadata import version

        print(f"hf-recycle {version('hf-recycle')}")
        return 0
    if command == "train":
        from hf_recycle.train import main as train

        return train(rest)
    if command == "push":
        from hf_recycle.cli.push import main as push

        return push(rest)
    if command == "report":
        from hf_recycle.cli.report import main as report

        return report(rest)
    if command == "pull":
        from hf_recycle.cli.pull import main as pull

        return pull(rest)
    print(f"error: unknown command {command!r}; {nearest(command, _COMMANDS)}", file=sys.stderr)
    return 2
