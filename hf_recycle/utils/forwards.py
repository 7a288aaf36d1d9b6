"""Modules that compute in another way for a while, and leave no trace of it behind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


class Forward:
    """Stands in for the `forward` of one module, within `replaced_forwards`.

    Attributes:
        original: what it stands in for; a copied or pickled module gets that.
        own: the method of the module's class, which is behind it, or behind several of these.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.own: Any = getattr(original, "own", original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __reduce__(self) -> tuple:
        return partial, (self.original,)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within the context, these modules compute by these forwards. A module to which someone else has given a forward
    of its own keeps it.

    The attribute, and neither class nor hooks, because compiled code that contains the module is then compiled once:
    the forwards are the same objects in every step.
    """
    free = {
        module: forward
        for module, forward in forwards.items()
        if "forward" not in vars(module) and module.forward == forward.own
    }
    try:
        for module, forward in free.items():
            module.forward = forward
        yield
    finally:
        for module, forward in free.items():
            if vars(module).get("forward") is forward:
                del module.forward
