"""The error a user can mend: one sentence that names the argument, its value and what to do."""


class UserError(ValueError):
    """Raised for bad arguments, files or data. The command line prints it without a traceback."""
