"""Flags of the commands that take a handful of them: unknown ones are refused with the nearest known one."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from hf_recycle.errors import UserError
from hf_recycle.utils.suggest import nearest


class Options(argparse.ArgumentParser):
    """A parser that raises `UserError`, takes no abbreviations, and reads `--some-name` as `--some_name`."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the command.

        Raises:
            UserError: an unknown flag, or a value that is missing or of the wrong type.
        """
        known = set(self._option_string_actions)
        tokens = []
        for word in words:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
                if name not in known:
                    raise UserError(f"unknown argument {name}; {nearest(name, known)}")
                word = name + equals + value
            tokens.append(word)
        namespace, rest = self.parse_known_args(tokens)
        if rest:
            raise UserError(f"unexpected {rest[0]!r}")
        return namespace


def run_command(
    words: Sequence[str], help_text: str, command: Callable[[Sequence[str]], None], needs_words: bool = True
) -> int:
    """Run `command` on its words; returns the exit status: 2 for what the user can mend, told in one line."""
    if (needs_words and not words) or {"-h", "--help"}.intersection(words):
        print(help_text, end="")
        return 0 if words else 2
    try:
        command(words)
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130
    return 0


def complain(error: Exception) -> int:
    """Say what is wrong in one line on stderr; returns the exit status 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def no_progress_bars() -> None:
    """Silence those of transformers and datasets: they are gone before they can be read."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
