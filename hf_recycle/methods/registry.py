"""A table of methods by name, filled by decorated functions."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

F = TypeVar("F", bound=Callable)


class Registry(Generic[F]):
    """Functions by name. Registering one is all it takes: arguments, help and generic tests read the table."""

    def __init__(self, kind: str):
        self.kind = kind
        self._functions: dict[str, F] = {}

    def register(self, function: F) -> F:
        """Decorator: adds `function` under its own name."""
        self._functions[function.__name__] = function
        return function

    def __getitem__(self, name: str) -> F:
        if name not in self._functions:
            raise ValueError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self)}")
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def describe(self) -> str:
        """`name: first line of its docstring` for each, for help texts."""
        return "; ".join(f"{name}: {(f.__doc__ or '').strip().splitlines()[0]}" for name, f in self._functions.items())
