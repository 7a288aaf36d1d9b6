"""Pushes in the background: a queue, one thread, and a word about everything that could not be published."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace

from transformers.utils import logging

from hf_recycle.hub.job import Push
from hf_recycle.hub.repository import Refused, Repository
from hf_recycle.hub.retry import CONFLICTS, passes, say, status_of
from hf_recycle.hub.staging import is_older, set_back, set_back_older, unstage

logger = logging.get_logger(__name__)

_PROGRESS = 15.0  # seconds between two words about what is being waited for


@dataclass(frozen=True)
class Unpublished:
    """A push that did not land, and why."""

    push: Push
    reason: str
    error: Exception | None = None


class Publisher:
    """Brings pushes to a repository, one after the other in the order in which they were asked for.

    Of waiting pushes that only update what the next one updates again, the newest is enough; those with `always` all
    land. A push that was given up is never published over a newer one that has landed since: it is forgotten, or only
    its folder and its tag are still published. None of the methods raises because of the Hub.

    Args:
        repository: where to.
        says_failures: say what could not be published when it is given up, after `finish` and `abandon`, and when the
            program ends; else only `unpublished` tells.
    """

    def __init__(self, repository: Repository, *, says_failures: bool = True):
        self.repository, self.policy, self._says = repository, repository.policy, says_failures
        self.unpublished: list[Unpublished] = []
        self._waiting: deque[tuple[Push, Future]] = deque()
        self._current: tuple[Push, Future] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last_call: float | None = None  # since when nothing but the pushes is left to do
        self._abandoned = False

    def submit(self, push: Push) -> Future:
        """Queues a push; the future gives its `CommitInfo`, or None if it could not be published.

        A push whose future is cancelled before it is taken up is dropped, with its copy.
        """
        future: Future = Future()
        with self._changed:
            # A run that was interrupted and goes on takes up what is left, perhaps while it is still on its way.
            under_way = [self._current] if self._current else []
            for other, its_future in [*under_way, *self._waiting]:
                if push.staged and other.folder == push.folder:
                    self._abandoned = False
                    return its_future
            if not (push.always or push.late):
                self._drop_older(push)
            self._abandoned = False
            self._waiting.append((push, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hf_recycle-publisher", daemon=True)
                self._thread.start()
                atexit.register(self._at_exit)
            self._changed.notify_all()
        return future

    def finish(self) -> None:
        """Waits until everything has landed or been given up, and says again what could not be published.

        As long as pushes land it waits; once none has for `policy.last_patience` seconds of failed attempts, the rest
        is given up.
        """
        said = time.monotonic()
        with self._changed:
            self._last_call = said
            self._changed.notify_all()
            while self._busy():
                self._changed.wait(1.0)
                if self._busy() and time.monotonic() - said >= _PROGRESS:
                    said = time.monotonic()
                    logger.warning("Waiting for %d push(es) to %s.", len(self._waiting) + 1, self.repository.name)
            self._last_call = None
        self._say_again()

    def abandon(self, grace: float = 5.0) -> None:
        """Stops pushing within `grace` seconds: training was interrupted. What is staged stays where it is."""
        with self._changed:
            pushes = self._pushes()
            self._abandoned = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy(), timeout=grace)
            if self._current is not None and self._current[0] in pushes:
                self._note(self._current[0], "it was interrupted")
        self._say_again()

    def report(self) -> str:
        """What could not be published, each with the command that publishes it later; empty if all is well."""
        lines = [f"  {item.push.command}\n    ({item.reason})" for item in self.unpublished]
        return "\n".join([f"Not published to {self.repository.name}; publish it later with:", *lines]) if lines else ""

    def _at_exit(self) -> None:
        """The program ends and nobody has waited, as after `push_to_hub(blocking=False)`."""
        with self._changed:
            for push in [] if self._abandoned else self._pushes():
                self._give_up(push, "the program ended before it was published")

    # ---- The thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                push, future = self._waiting.popleft()
                if not future.set_running_or_notify_cancel():  # from here on nobody can cancel it
                    unstage(push)
                    continue
                self._current = push, future
            try:
                info = self._land(push)
            except Exception as error:  # a mistake of ours must not leave anyone waiting
                info = self._give_up(push, f"{type(error).__name__}: {say(error)}")
            if info is not None:
                try:
                    self._settle(push)
                except Exception as error:  # of the disk
                    logger.error("What is left to publish to %s can't be noted: %s", self.repository.name, say(error))
                unstage(push)
            future.set_result(info)

    def _land(self, push: Push):
        began, attempt = time.monotonic(), 0
        while not self._abandoned:
            try:
                info = self.repository.publish(push)
            except Exception as error:
                attempt += 1
                reason = say(error)
                if isinstance(error, Refused) or not passes(error):
                    return self._give_up(push, reason, error)
                wait = self.policy.wait(1 if status_of(error) in CONFLICTS else attempt, error)
                if self._out_of_patience(began, wait):
                    return self._give_up_all(push, reason)
                if attempt == 2:
                    logger.warning(
                        "Pushing %r to %s does not work yet (%s); training goes on and it is tried again.",
                        push.message,
                        self.repository.name,
                        reason,
                    )
                self._sleep(wait)
            else:
                with self._changed:
                    if self._last_call is not None:
                        self._last_call = time.monotonic()
                return info
        return self._give_up_all(push, "it was interrupted")

    def _settle(self, landed: Push) -> None:
        """Of a push that has landed nothing is left, and older ones must not be published over it."""
        with self._changed:
            # An earlier attempt may have been given up, or this one while it was on its way.
            done = (landed.folder, landed.revision)
            self.unpublished = [i for i in self.unpublished if (i.push.folder, i.push.revision) != done]
            # An output folder has no number: all copies that were given up by now were made before it was pushed.
            given_up = [
                (item, self._left_after(landed, item.push, is_older(item.push, landed) or not landed.staged))
                for item in self.unpublished
            ]
            self.unpublished = [replace(item, push=left) for item, left in given_up if left is not None]
            # What an interrupted run left may have been taken up while a newer push was still on its way.
            waiting = [(self._left_after(landed, one, is_older(one, landed)), future) for one, future in self._waiting]
            for left, future in waiting:
                if left is None:
                    future.cancel()
            self._waiting = deque((left, future) for left, future in waiting if left is not None)
            set_back_older(landed)

    def _left_after(self, landed: Push, push: Push, is_older: bool) -> Push | None:
        """What is still to be published of another push. An output folder stays: it may hold a newer model by then."""
        if not (is_older and push.staged) or landed.late or push.branch != landed.branch:
            return push
        if push.always or push.after(landed).has_place:
            return set_back(push, landed)
        unstage(push)
        if self._says:
            logger.warning("%r need not be published any more: %r was.", push.message, landed.message)
        return None

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            before = self._last_call
            # At the end of training a long wait is cut short: there is nothing else to do then.
            self._changed.wait_for(lambda: self._abandoned or (before is None) != (self._last_call is None), seconds)

    def _out_of_patience(self, began: float, wait: float) -> bool:
        now = time.monotonic() + wait
        last_call = self._last_call
        if last_call is not None:
            return now - last_call > self.policy.last_patience
        return now - began > self.policy.patience

    def _give_up(self, push: Push, reason: str, error: Exception | None = None) -> None:
        with self._changed:
            self._note(push, reason, error)
        if not self._says:
            return
        logger.error(
            "Could not publish %r to %s: %s. Publish it later with: %s",
            push.message,
            self.repository.name,
            reason,
            push.command,
        )

    def _give_up_all(self, push: Push, reason: str) -> None:
        """At the very end, or when stopped: if one push can't land, the others have no time left to try."""
        self._give_up(push, reason)
        if self._last_call is None and not self._abandoned:
            return
        with self._changed:
            rest, self._waiting = list(self._waiting), deque()
        for push, future in rest:
            if future.set_running_or_notify_cancel():
                self._give_up(push, reason)
                future.set_result(None)
            else:
                unstage(push)

    # ---- Under the lock ----

    def _pushes(self) -> list[Push]:
        under_way = [self._current] if self._current else []
        return [push for push, future in [*under_way, *self._waiting] if not future.cancelled()]

    def _busy(self) -> bool:
        return self._current is not None or bool(self._waiting)

    def _drop_older(self, push: Push) -> None:
        kept: deque[tuple[Push, Future]] = deque()
        for older, future in self._waiting:
            if older.always or older.late or older.branch != push.branch:
                kept.append((older, future))
            else:
                unstage(older)
                future.cancel()
        self._waiting = kept

    def _note(self, push: Push, reason: str, error: Exception | None = None) -> None:
        if all(item.push is not push for item in self.unpublished):
            self.unpublished.append(Unpublished(push, reason, error))

    def _say_again(self) -> None:
        if self._says and (text := self.report()):
            logger.warning("%s", text)
