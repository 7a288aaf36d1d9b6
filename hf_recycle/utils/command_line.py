"""The parser of every command: one style of flags, of errors and of help."""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from hf_recycle.errors import UserError
from hf_recycle.internals.of_python import flags_of, has_commands
from hf_recycle.utils.suggest import nearest

_NUMBER = re.compile(r"-\.?\d.*")


class Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal; indented lines of descriptions are examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            "\n".join(_example(line, width) for line in part.split("\n"))
            if part.startswith("  ")
            else textwrap.fill(" ".join(part.split()), width, break_on_hyphens=False)
            for part in text.strip("\n").split("\n\n")
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # last-checkpoint/ is one word

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = getattr(action.type, "__name__", "str")
        return "TEXT" if name == "str" else name.upper()


def _example(line: str, width: int) -> str:
    """A command and, behind two spaces or more, what it does; below it where the terminal is too narrow."""
    command, _, comment = re.sub("   +", "  ", line.strip()).partition("  ")
    if line.startswith(" " * 6):  # what the command above, which fills its line, does
        command, comment = "", line.strip()
    below = textwrap.fill(comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if not command:
        return below
    return line if len(line) <= width or not comment else f"  {command}\n{below}"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, takes no abbreviations, and reads `-` and `_` in a flag as the same.

    Attributes:
        add_later: adds arguments that take seconds to import; called when a flag is met that is not known without.
    """

    def __init__(self, **kwargs: Any):
        add_help = kwargs.pop("add_help", True)
        super().__init__(formatter_class=Formatter, allow_abbrev=False, add_help=False, **kwargs)
        if add_help:
            self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        self.add_later: Callable[[], None] | None = None

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message = f"{message}; see {self.prog} --help"
        if message.startswith("unrecognized arguments: "):  # no flags: those that are unknown were refused before
            message = f"unexpected {message.partition(': ')[2]!r}; names go before the arguments"
        raise UserError(message)

    def parse_known_args(  # type: ignore[override]  # of two overloads, which differ in the type of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse words, of which every flag must be known.

        Raises:
            UserError: an unknown flag, with the nearest known one, or a value that is missing or of the wrong type.
        """
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._spelled(words), namespace)

    def _spelled(self, words: list[str]) -> list[str]:
        """The words with flags as they were declared. Those of another command, behind its name, stay."""
        spelled: list[str] = []
        for position, word in enumerate(words):
            if word == "--" or (has_commands(self) and not word.startswith("-")):
                return spelled + words[position:]
            name, equals, value = word.partition("=")
            if len(word) > 1 and word.startswith("-") and not _NUMBER.fullmatch(word) and " " not in name:
                word = self._declared(name) + equals + value
            spelled.append(word)
        return spelled

    def _declared(self, name: str) -> str:
        declared = {known.replace("-", "_"): known for known in flags_of(self)}
        if (found := declared.get(name.replace("-", "_"))) is not None:
            return found
        if self.add_later is not None:
            add_later, self.add_later = self.add_later, None
            add_later()
            return self._declared(name)
        raise UserError(f"unknown argument {name}; {self._hint(name)}")

    def _hint(self, name: str) -> str:
        known = [flag[2:] for flag in flags_of(self) if re.match("--(?!no_)", flag)]
        hint = nearest(name.lstrip("-").replace("-", "_"), known)
        found = hint.startswith("did you mean ")
        return hint.replace("mean ", "mean --", 1) if found else f"{self.prog} --help lists the known ones"


def completed_by(action: argparse.Action, names: Callable[[str], Iterable[str]]) -> argparse.Action:
    """`action`, with names that argcomplete offers for its value; `names` is given what was typed of it."""
    action.completer = lambda prefix, **_: names(prefix)  # type: ignore[attr-defined]
    return action
