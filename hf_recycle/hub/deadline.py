"""Requests to the Hub that end in time.

The Hub's client waits for an answer without end, tries again by itself, and sleeps for as long as the Hub asks it to,
five times for each request. Hooks on its session, which are there only during a call of ours and look only at requests
of ours, let each failure through at once, so that one deadline and one policy hold for everything.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx2
from huggingface_hub.utils import get_session, hf_raise_for_status

from hf_recycle.hub.retry import WrongAnswer

_SILENCE = 120.0  # seconds without a byte after which a request has failed
_TRIED_AGAIN = (408, 429, 500, 502, 503, 504)  # by the client itself
_SLOWEST = 2**20  # bytes a second of an upload that is still worth waiting for
_CURRENT: ContextVar[Deadline | None] = ContextVar("hf_recycle_deadline", default=None)
_HOOKS = threading.Lock()


class Overdue(Exception):
    """There is no time left for another request."""

    def __init__(self) -> None:
        super().__init__("the Hub did not answer in time")


class Deadline:
    """Until when requests may go on: without end, until `begin` or `stop` is called."""

    def __init__(self, patience: float | None = None) -> None:
        self._patience, self._ends, self._allowed = math.inf, math.inf, 0.0
        self._changed = threading.Event()
        if patience is not None:
            self.begin(patience)

    def begin(self, patience: float) -> None:
        """From now on, requests end once there was no success for `patience` seconds."""
        self._patience = patience
        self.renew()
        self._changed.set()

    def renew(self) -> None:
        """Something has succeeded."""
        self._ends = time.monotonic() + self._patience

    def stop(self) -> None:
        """No further request."""
        self._patience, self._ends = -math.inf, -math.inf
        self._changed.set()

    def lift(self) -> None:
        """Time matters no more, unless it was stopped."""
        if self._patience > 0:
            self._patience = self._ends = math.inf

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._ends + self._allowed - time.monotonic()

    @contextmanager
    def allowing(self, size: int) -> Iterator[None]:
        """Within it, `size` bytes go up; the time that this takes does not count, unless it fails."""
        began, self._allowed = time.monotonic(), size / _SLOWEST
        try:
            yield
            self._ends += min(time.monotonic() - began, self._allowed)
        finally:
            self._allowed = 0.0

    def sleep(self, seconds: float) -> None:
        """Waits; shorter if the deadline changes meanwhile.

        Raises:
            Overdue: no time would be left afterwards.
        """
        self._changed.clear()
        if self.left > seconds:
            self._changed.wait(seconds)
            if self.left > 0:
                return
        raise Overdue

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within it, the client's requests are held to this deadline, if this thread makes them or they upload a file,
        for which the client has threads of its own."""
        unanswered: set[tuple[int, str, str]] = set()

        def before(request: httpx2.Request) -> None:
            if not self._is_ours(request):
                return
            if self.left <= 0:
                raise Overdue
            key = (threading.get_ident(), request.method, str(request.url))
            if key in unanswered:  # the client tries again
                raise WrongAnswer(f"no answer to {request.method} {request.url.copy_with(query=None)}")
            unanswered.add(key)
            limits = request.extensions.get("timeout") or {}
            most = min(_SILENCE, self.left)
            limits = {kind: min(most, limits.get(kind) or most) for kind in ("connect", "read", "write", "pool")}
            request.extensions = {**request.extensions, "timeout": limits}

        def after(response: httpx2.Response) -> None:
            request = response.request
            if not self._is_ours(request):
                return
            if response.status_code in _TRIED_AGAIN:
                response.read()
                hf_raise_for_status(response)
            unanswered.discard((threading.get_ident(), request.method, str(request.url)))
            if response.is_success and response.headers.get("content-type", "").startswith("text/html"):
                raise WrongAnswer(f"a page instead of the Hub's answer to {request.method} {request.url.path}")
            if response.is_success and request.method == "PUT":
                self.renew()

        session, token = get_session(), _CURRENT.set(self)
        _change_hooks(session, lambda kind, hooks: [*hooks, before if kind == "request" else after])
        try:
            yield
        finally:
            _CURRENT.reset(token)
            _change_hooks(session, lambda kind, hooks: [hook for hook in hooks if hook not in (before, after)])

    def _is_ours(self, request: httpx2.Request) -> bool:
        return _CURRENT.get() is self or request.method == "PUT"


def _change_hooks(session: httpx2.Client, change: Callable[[str, list], list]) -> None:
    with _HOOKS:  # new lists, because other threads may be going through the old ones
        session.event_hooks = {kind: change(kind, hooks) for kind, hooks in session.event_hooks.items()}
