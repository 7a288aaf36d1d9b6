"""Calls of the Hub's client, each tried a few times and held to a deadline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_recycle.hub.deadline import Deadline
from hf_recycle.hub.retry import Result, RetryPolicy, WrongAnswer, insist


@dataclass(frozen=True)
class Asking:
    """`ask(call, ...)` is what `call(...)` gives.

    Raises:
        Overdue: there is no time left.
        WrongAnswer: what was answered makes no sense.
        Exception: whatever else the client raises.
    """

    policy: RetryPolicy
    deadline: Deadline

    def __call__(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        def once() -> Result:
            with self.deadline.watch():
                try:
                    return call(*args, **kwargs)
                except (KeyError, TypeError, AttributeError) as error:  # not what the Hub's answers look like
                    raise WrongAnswer(f"an answer that is not the Hub's ({type(error).__name__}: {error})") from error

        return insist(self.policy, once, self.deadline.sleep)
