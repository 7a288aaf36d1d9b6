"""The error a user can mend: one sentence that names the argument, its value and what to do."""


class UserError(ValueError):
    """Raised for bad arguments, files or data. The command line prints it without a traceback."""


def reason_of(error: BaseException) -> str:
    """The first line of what a library says, without a full stop; the name of an error that says nothing."""
    return str(error).strip().split("\n", 1)[0][:300].rstrip(". ") or type(error).__name__


def first_line(error: BaseException) -> str:
    """The same with the kind of error before it."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
