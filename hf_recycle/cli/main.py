"""The command line: `hf-recycle COMMAND ...`. Nothing heavy is imported before a command runs.

A command is a module of this folder with three names: `HELP`, what it does in a line; `add_arguments(parser)`; and
`run(options)`, which returns the exit status.
"""

import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

from hf_recycle import __version__
from hf_recycle.cli.common import add_common_arguments, complain, no_progress_bars_to_come, set_verbosity
from hf_recycle.errors import UserError
from hf_recycle.runs.interruption import Terminated, sigterm_as_interrupt
from hf_recycle.utils.command_line import Parser
from hf_recycle.utils.suggest import nearest

COMMANDS = ("train", "analyze", "shrink", "resize", "study", "report", "push", "pull")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if it failed, 2 for what the user can mend, told in one line, 130
    and 143 after Ctrl-C and SIGTERM, 141 if what reads the output has ended, such as `head`."""
    # Threads that wait for others sleep. By default they spin, which holds the core that the others need: where other
    # programs work too, steps take tens of times as long (docs/speed.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = list(sys.argv[1:] if argv is None else argv)
    # Before the words are read, which may import transformers. In a log, a bar is a flood of lines; losses are lines of
    # their own where there is no bar.
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(words):
        no_progress_bars_to_come()
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:
        _complete(parser)
    if not words:
        parser.print_help()
        return 2
    try:
        if not words[0].startswith("-") and words[0] not in COMMANDS:
            raise UserError(f"unknown command {words[0]!r}; {nearest(words[0], COMMANDS)}")
        options = parser.parse_args(words)
        options.words = words[1:]
        set_verbosity(options)
        with sigterm_as_interrupt():
            status = options.run(options)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # Python flushes the output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt as stop:
        return 143 if isinstance(stop, Terminated) else 130


def _reader_has_gone() -> bool:
    """Whether what reads the standard output, such as `head`, has ended."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def make_parser() -> Parser:
    """The tree of all commands."""
    parser = Parser(
        prog="hf-recycle",
        description="Neuron recycling for transformers.",
        epilog="Completion of commands and arguments in this shell:\n\n"
        '  eval "$(register-python-argcomplete hf-recycle)"',
    )
    parser.add_argument(
        "--version", action="version", version=f"hf-recycle {__version__}", help="Print the version and exit."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name in COMMANDS:
        module = import_module(f"hf_recycle.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        add_common_arguments(command)
    return parser


def _complete(parser: Parser) -> None:
    """Answer the shell that asks what may follow, and exit; without argcomplete there is no answer."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    argcomplete.autocomplete(parser, always_complete_options="long")
