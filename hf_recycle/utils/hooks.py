"""Hooks that are on a model for a while only."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


class PassingHook:
    """A hook of the forward pass of `module`, which it does not keep alive: before that pass, or `behind` it."""

    def __init__(self, module: nn.Module, hook: Callable, behind: bool = False) -> None:
        self._module, self._hook, self._behind = weakref.ref(module), hook, behind

    def register(self):
        module = self._module()
        assert module is not None
        return (module.register_forward_hook if self._behind else module.register_forward_pre_hook)(self._hook)


@contextmanager
def registered(hooks: Iterable[PassingHook]) -> Iterator[None]:
    """Within the context, the hooks are on their modules."""
    handles = [hook.register() for hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
