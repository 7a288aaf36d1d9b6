"""Which failures of the Hub pass by themselves, and how long to wait before the next attempt."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

# Conflicts among them: another attempt starts from what is there by then.
CONFLICTS = frozenset({409, 412})
_PASSING = CONFLICTS | {408, 425, 429}
# Our own, or retrying would draw from the generator that the user's data may be made with.
_RANDOM = random.Random()
_QUICK_ATTEMPTS, _QUICK_WAIT = 4, 10.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How patiently a push is tried again.

    Attributes:
        first, longest: seconds of the first and of the longest wait; they double from one to the next.
        start_patience: seconds for which the start of training waits for the Hub.
        patience: seconds for which one push is tried while training goes on.
        last_patience: seconds for which pushes are tried without any success once nothing else is left to do.
    """

    first: float = 1.0
    longest: float = 60.0
    start_patience: float = 30.0
    patience: float = 3600.0
    last_patience: float = 60.0

    def wait(self, attempt: int, error: BaseException) -> float:
        """Seconds to wait after the attempt-th failure (from 1): what the Hub asks for, or a doubling, random share.

        Random, because the runs of a cluster that failed together should not come back together.
        """
        ceiling = min(self.longest, self.first * 2 ** min(attempt - 1, 30))
        wait = _RANDOM.uniform(0.5, 1) * ceiling
        return max(wait, min(asked_for(error), self.patience))


class WrongAnswer(Exception):
    """Something between us and the Hub has answered in its place."""


def insist(policy: RetryPolicy, call: Callable[[], Result], sleep: Callable[[float], None] = time.sleep) -> Result:
    """One step of a push, or a download, tried a few times with short waits.

    A push is a dozen requests; if it began anew after each that fails, it would never get through a Hub that fails one
    in three. What needs a long wait, or another start, is raised.
    """
    for attempt in range(1, _QUICK_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            wait = policy.wait(attempt, error)
            if not passes(error) or status_of(error) in CONFLICTS or wait > _QUICK_WAIT:
                raise
            sleep(wait)
    return call()


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, WrongAnswer):
        return True
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return False
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError | httpx2.HTTPStatusError):
            # An upload's own address expires: its refusals come as the cause of a RuntimeError, and pass.
            status = status_of(cause) or 0
            return status in _PASSING or status >= 500 or isinstance(error, RuntimeError)
        if isinstance(cause, httpx2.TransportError | LocalEntryNotFoundError | ConnectionError | TimeoutError):
            return True
    # An answer that is no JSON comes from something between us and the Hub; uploads report failures as RuntimeError.
    return type(error).__name__ == "JSONDecodeError" or isinstance(error, RuntimeError)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, or None."""
    response = _response(error)
    return None if response is None else response.status_code


def asked_for(error: BaseException) -> float:
    """Seconds that the Hub asked to wait, 0 if it did not."""
    response = _response(error)
    if response is None:
        return 0.0
    after = response.headers.get("retry-after", "")
    if after.isdecimal():
        return float(after)
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and response.status_code == 429 else 0.0


def say(error: BaseException) -> str:
    """An error in one short line, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:300].rstrip(". ") or type(error).__name__
    status = status_of(error)
    return text if status is None or str(status) in text else f"{status}: {text}"


def _response(error: BaseException) -> Any:
    """The HTTP library's answer behind an error, or None."""
    found = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response for response in found if response is not None), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
