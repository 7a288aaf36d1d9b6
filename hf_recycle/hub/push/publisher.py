"""Pushes in the background: a queue, one thread, and a word about everything that could not be published."""

import atexit
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from huggingface_hub import CommitInfo
from transformers.utils import logging

from hf_recycle.hub.deadline import Deadline, Overdue
from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.repository import Refused, Repository
from hf_recycle.hub.push.staging import is_overtaken, note_landed, take_turn, unstage
from hf_recycle.hub.retry import CONFLICTS, passes, say, status_of
from hf_recycle.utils.locks import FileLock

logger = logging.get_logger(__name__)

_PROGRESS = 15.0  # seconds between two words about what is being waited for
_LATE = 1.0  # seconds that a thread has to notice its deadline, before nobody waits for it any more


@dataclass(frozen=True)
class Unpublished:
    """A push that did not land, and why."""

    push: Push
    reason: str
    error: Exception | None = None


class Publisher:
    """Brings pushes to a repository, one after the other in the order in which they were asked for.

    Of waiting pushes that only update what the next one updates again, the newest is enough; those with `always` all
    land. What was given up is never published over a newer push that has landed since. None of the methods raises
    because of the Hub.

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
        self._deadline: Deadline | None = None  # that of the thread; another one means that it was given up
        self._turn: FileLock | None = None

    def submit(self, push: Push) -> Future:
        """Queues a push; the future gives its `CommitInfo`, or None if it could not be published.

        A push whose future is cancelled before it is taken up is dropped, with its copy.
        """
        future: Future = Future()
        with self._changed:
            # A run that was interrupted and goes on takes up what is left, perhaps while it is still on its way.
            for other, its_future in self._pushes():
                if push.staged and other.folder == push.folder:
                    return its_future
            if not push.always:
                self._drop_older(push)
            self._waiting.append((push, future))
            if self._deadline is None:
                self._deadline = Deadline()
                name = "hf_recycle-publisher"
                threading.Thread(target=self._run, args=[self._deadline], name=name, daemon=True).start()
                atexit.register(self._at_exit)
            self._changed.notify_all()
        return future

    def finish(self) -> None:
        """Waits until everything has landed or been given up, and says again what could not be published.

        As long as pushes land it waits; once nothing has for `policy.last_patience` seconds, the rest is given up,
        whatever the thread is waiting for.
        """
        said = time.monotonic()
        with self._changed:
            if self._deadline is not None:
                self._deadline.begin(self.policy.last_patience)
            while self._busy() and self._deadline is not None:
                self._changed.wait(min(1.0, max(0.0, self._deadline.left + _LATE)))
                if self._busy() and self._deadline is not None and self._deadline.left < -_LATE:
                    self._leave(str(Overdue()))
                elif self._busy() and time.monotonic() - said >= _PROGRESS:
                    said = time.monotonic()
                    logger.warning("Waiting for %d push(es) to %s.", len(self._pushes()), self.repository.name)
            if self._deadline is not None:
                self._deadline.lift()
        self._say_again()

    def abandon(self, grace: float = 5.0) -> None:
        """Stops pushing within `grace` seconds: training was interrupted. What is staged stays where it is."""
        with self._changed:
            if self._deadline is not None:
                self._deadline.stop()
                self._changed.wait_for(lambda: not self._busy(), timeout=grace)
                self._leave("it was interrupted")
        self._say_again()

    def report(self) -> str:
        """What could not be published, each with the command that publishes it later; empty if all is well."""
        lines = [f"  {item.push.command}\n    ({item.reason})" for item in self.unpublished]
        return "\n".join([f"Not published to {self.repository.name}; publish it later with:", *lines]) if lines else ""

    def _at_exit(self) -> None:
        """The program ends and nobody has waited, as after `push_to_hub(blocking=False)`."""
        with self._changed:
            self._leave("the program ended before it was published")

    # ---- The thread ----

    def _run(self, deadline: Deadline) -> None:
        while True:
            with self._changed:
                if self._deadline is not deadline:
                    return
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._deadline is not deadline)
                if self._deadline is not deadline:
                    return
                push, future = self._waiting.popleft()
                if not future.set_running_or_notify_cancel():  # from here on nobody can cancel it
                    unstage(push)
                    continue
                self._current = push, future
            outcome = self._land(push, deadline)
            with self._changed:
                if self._deadline is not deadline:
                    return  # given up meanwhile: it is for whoever publishes it later to find that it has landed
                self._settle(push, outcome)
                self._end_turn()
                self._current = None
                future.set_result(None if isinstance(outcome, Unpublished) else outcome)
                if isinstance(outcome, Unpublished) and (isinstance(outcome.error, Overdue) or deadline.left <= 0):
                    # If one push can't land in the time that is left, the others have none to try.
                    self._leave(outcome.reason)

    def _land(self, push: Push, deadline: Deadline) -> CommitInfo | Unpublished | None:
        """The commit; why there is none; or None if there is nothing to do any more."""
        began, attempt, reason = time.monotonic(), 0, ""
        try:
            self._turn = take_turn(push, deadline)
            if push.staged and not push.folder.is_dir():
                return None  # another process has published it
        except Overdue as error:
            return Unpublished(push, "another process was publishing from there", error)
        while True:
            try:
                return self.repository.publish(push, deadline)
            except Overdue as error:  # after a failure, or while waiting for an answer
                return Unpublished(push, reason or say(error.__context__ or error), error)
            except Exception as error:
                attempt += 1
                reason = say(error)
                wait = self.policy.wait(1 if status_of(error) in CONFLICTS else attempt, error)
                late = time.monotonic() + wait - began > self.policy.patience and math.isinf(deadline.left)
                if isinstance(error, Refused) or not passes(error) or late:
                    return Unpublished(push, reason, error)
            if attempt == 2:
                logger.warning(
                    "Pushing %r to %s does not work yet (%s); it is tried again.",
                    push.message,
                    self.repository.name,
                    reason,
                )
            try:
                deadline.sleep(wait)
            except Overdue as error:
                return Unpublished(push, reason, error)

    # ---- Under the lock ----

    def _settle(self, push: Push, outcome: CommitInfo | Unpublished | None) -> None:
        if isinstance(outcome, Unpublished):
            if isinstance(outcome.error, Refused) and not push.always and self._is_overtaken(push):
                unstage(push)  # as if the newer push had found it waiting
                return
            self._give_up(outcome)
            return
        # An earlier attempt may have been given up.
        self.unpublished = [i for i in self.unpublished if (i.push.folder, i.push.branch) != (push.folder, push.branch)]
        if outcome is not None:
            if self._deadline is not None:
                self._deadline.renew()
            try:
                note_landed(push, self.repository.repo_id or self.repository.name)
            except OSError as error:
                logger.error("What has landed on %s can't be noted: %s", self.repository.name, say(error))
        self.unpublished = [left for item in self.unpublished if (left := self._left_of(item, push)) is not None]
        unstage(push)

    def _left_of(self, item: Unpublished, landed: Push) -> Unpublished | None:
        """What is left to publish of what was given up, now that another push has landed."""
        push = item.push
        if not self._is_overtaken(push) or push.has_own_folder:
            return item
        if push.always:
            # A branch of its own is what it can still be published on.
            return Unpublished(push.to(revision=push.folder.name.partition("-")[2]), item.reason, item.error)
        unstage(push)
        if self._says:
            logger.warning("%r need not be published any more: %r was.", push.message, landed.message)
        return None

    def _is_overtaken(self, push: Push) -> bool:
        return is_overtaken(push, self.repository.repo_id or self.repository.name)

    def _give_up(self, item: Unpublished) -> None:
        if any(known.push is item.push for known in self.unpublished):
            return
        self.unpublished.append(item)
        if self._says:
            logger.error(
                "Could not publish %r to %s: %s. Publish it later with: %s",
                item.push.message,
                self.repository.name,
                item.reason,
                item.push.command,
            )

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.release()

    def _leave(self, reason: str) -> None:
        """Gives up everything, and the thread too, which may hang in the client; the next push starts another."""
        left, self._current, self._waiting = self._pushes(), None, deque()
        if self._deadline is not None:
            self._deadline.stop()
        self._deadline = None
        self._end_turn()
        for push, future in left:
            if future.running() or future.set_running_or_notify_cancel():
                self._give_up(Unpublished(push, reason))
                future.set_result(None)
            else:
                unstage(push)
        self._changed.notify_all()

    def _pushes(self) -> list[tuple[Push, Future]]:
        return [*([self._current] if self._current else []), *self._waiting]

    def _busy(self) -> bool:
        return self._current is not None or bool(self._waiting)

    def _drop_older(self, push: Push) -> None:
        kept: deque[tuple[Push, Future]] = deque()
        for older, future in self._waiting:
            if older.always or older.branch != push.branch:
                kept.append((older, future))
            else:
                unstage(older)
                future.cancel()
        self._waiting = kept

    def _say_again(self) -> None:
        if self._says and (text := self.report()):
            logger.warning("%s", text)
