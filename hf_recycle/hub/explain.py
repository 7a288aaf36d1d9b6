"""What went wrong with the Hub, in a user's words."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from hf_recycle.errors import UserError

_UNREACHABLE = (LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled)


def explain(error: Exception, what: str = "it") -> tuple[str, str]:
    """The problem behind an error of the Hub's client and what to do about it, each a clause.

    Args:
        what: the file that was asked for.
    """
    # The client says "not in the cache" also where the Hub did answer.
    if isinstance(error, _UNREACHABLE) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    match error:
        case HFValidationError():
            return "it is not the name of a repository", "check the spelling"
        case GatedRepoError():
            return "access to this repository is restricted", "ask for access on its page and log in"
        case RepositoryNotFoundError():
            problem = "there is no such repository on the Hub that you may read"
            return problem, "check the spelling, or log in if it is private"
        case RevisionNotFoundError():
            return "the repository has no such revision", "check the branch, tag or commit"
        case LocalEntryNotFoundError() | RevisionResolutionError() | OfflineModeIsEnabled():
            return f"{what} is not in the cache and the Hub can't be reached", "try again when online"
        case EntryNotFoundError():
            return f"the repository has no {what}", "name another repository or revision"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return "the Hub does not know your token", "log in again with `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return "your token may not read this", "use one with the right to read this repository"
    reason = f"the Hub answers with status {status}" if status else type(error).__name__
    return f"{what} can't be downloaded ({reason})", "try again later"


def is_maybe_a_folder(error: Exception) -> bool:
    """Whether this may come of asking the Hub for a local folder whose name was mistyped."""
    maybe = isinstance(error, HFValidationError | RepositoryNotFoundError | LocalEntryNotFoundError)
    return maybe and not isinstance(error, GatedRepoError)


@contextmanager
def explained(where: object) -> Iterator[None]:
    """Errors of the Hub's client become a `UserError` of one sentence that begins with `where`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client lets the errors of its HTTP library through, whichever that is
        problem, remedy = explain(error)
        raise UserError(f"{where}: {problem}; {remedy}") from error
