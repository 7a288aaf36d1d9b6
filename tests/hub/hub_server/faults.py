"""Faults on request: which requests go wrong, and how. Deterministic, so a failing test fails again."""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Action = Literal[
    "status",  # answer `status` at once, with `Retry-After` if `retry_after` is given
    "page",  # answer 200 with a page of HTML, as the portal of a network does
    "delay",  # wait `delay` seconds, then answer as usual
    "drop",  # close the connection without a word
    "reset_request",  # reset the connection after half of the request's body was read
    "reset_response",  # do what was asked, then reset after half of the answer's body
    "truncate",  # do what was asked, then end the connection after half of the answer's body
    "lose_response",  # do what was asked, and close the connection without an answer
]


@dataclass
class Fault:
    """Requests that match go wrong.

    Attributes:
        match: a regular expression, searched for in `"METHOD /path?query"`.
        action: what happens to them.
        status: the status of action `status`.
        retry_after: seconds in its `Retry-After`.
        delay: seconds of action `delay`.
        every: of the matching requests, each `every`-th goes wrong (3: one in three).
        nth: only these of the matching requests go wrong, counted from 1; overrides `every`.
        times: no more than so many go wrong; None for no limit.
    """

    match: str
    action: Action = "status"
    status: int = 503
    retry_after: int | None = None
    delay: float = 0.0
    every: int = 1
    nth: tuple[int, ...] = ()
    times: int | None = None
    seen: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def strikes(self, line: str) -> bool:
        """Counts a request; whether it goes wrong."""
        if not re.search(self.match, line) or (self.times is not None and self.fired >= self.times):
            return False
        self.seen += 1
        hit = self.seen in self.nth if self.nth else self.seen % self.every == 0
        self.fired += hit
        return hit


class Faults:
    """The faults in force; the first that strikes counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def set(self, faults: Iterable[Fault] = ()) -> None:
        """Replaces all faults."""
        with self._lock:
            self._faults = list(faults)

    def strike(self, line: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(line)), None)
