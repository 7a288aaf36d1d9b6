"""Pretrain a model from recipes and arguments.

`python -m hf_recycle.train`, `accelerate launch -m hf_recycle.train` and `hf-recycle train` are the same.
"""

import os
import sys
from collections.abc import Sequence

from hf_recycle.errors import UserError
from hf_recycle.runs.leaving import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run `RECIPE ... --argument value ...`; returns the exit status.

    0 is success, 2 a mistake the user can mend (one sentence on stderr), 130 and 143 mean Ctrl-C and SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--list" in words:
        from hf_recycle.runs.recipes import describe_recipes

        print(describe_recipes())
        return 0
    if not words or {"-h", "--help", "--help-all"}.intersection(words):
        from hf_recycle.cli.help import help_text

        print(help_text(everything="--help-all" in words))
        return 0 if words else 2
    try:
        return _run(words)
    except UserError as error:
        _complain(error)
        return 2


def _run(words: list[str]) -> int:
    # Imported late: importing torch takes seconds, and the branches above do without it.
    from hf_recycle.runs.interruption import Terminated, sigterm_as_interrupt
    from hf_recycle.runs.launcher import launch, split_launch_options
    from hf_recycle.runs.parse import parse_run

    options, words = split_launch_options(words)
    if options:
        return launch(options, words)
    with sigterm_as_interrupt():
        run = None
        try:
            with _bad_values_are_user_errors():
                arguments = parse_run(words)
                from hf_recycle.runs.run import Run

                run = Run.prepare(arguments, words)
            run.train()
            # Processes that just exit while others still work may die in the threads of their process group.
            run.trainer.end()
        except KeyboardInterrupt as stop:
            if os.environ.get("RANK", "0") == "0":
                how = run.how_to_go_on(words) if run is not None else "nothing was trained yet"
                print(f"\nstopped; {how}", file=sys.stderr)
            return 143 if isinstance(stop, Terminated) else 130
    return 0


class _bad_values_are_user_errors:
    """Before training starts a ValueError is about an argument: those of transformers are ValueErrors too."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, UserError):
            raise UserError(str(error)) from error


def _complain(error: Exception) -> None:
    # Every process of a launch meets the same mistake; one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    leave(main())
