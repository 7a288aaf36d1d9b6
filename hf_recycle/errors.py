"""The error a user can mend: one sentence that names the argument, its value and what to do."""


class UserError(ValueError):
    """Raised for bad arguments, files or data. The command line prints it without a traceback."""


def first_line(error: BaseException) -> str:
    """What a library says, short enough to be part of a sentence."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
