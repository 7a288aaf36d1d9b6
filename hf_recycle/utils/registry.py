"""A table of methods by name, filled by decorated functions."""

import ast
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

F = TypeVar("F", bound=Callable)


class Registry(Generic[F]):
    """Functions by name. Registering one is all it takes: arguments, help and generic tests read the table."""

    def __init__(self, kind: str, home: str = ""):
        """
        Args:
            kind: what the functions are, for messages.
            home: the module of the built-in functions, if it is not the one that makes the table. It is imported once
                a function is asked for, and its source is read for help texts, which need no torch.
        """
        self.kind = kind
        self._home = home
        self._functions: dict[str, F] = {}

    def register(self, function: F) -> F:
        """Decorator: adds `function` under its own name."""
        self._functions[function.__name__] = function
        return function

    def _filled(self) -> dict[str, F]:
        if self._home:
            import_module(self._home)
        return self._functions

    def __getitem__(self, name: str) -> F:
        if name not in self._filled():
            raise ValueError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self)}")
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._filled())

    def describe(self) -> str:
        """`name: first line of its docstring` for each, for help texts."""
        return "; ".join(f"{name}: {text.strip().splitlines()[0]}" for name, text in self._docstrings().items())

    def names(self) -> list[str]:
        """The names, for help texts."""
        return list(self._docstrings())

    def _docstrings(self) -> dict[str, str]:
        """Docstrings by name, without importing the home."""
        texts = {name: (function.__doc__ or "") for name, function in self._functions.items()}
        if self._home:
            spec = find_spec(self._home)
            assert spec is not None
            source = Path(str(spec.origin)).read_text(encoding="utf-8")
            functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
            texts = {f.name: ast.get_docstring(f) or "" for f in functions if _is_registered(f)} | texts
        return texts


def _is_registered(function: ast.FunctionDef) -> bool:
    return any(isinstance(item, ast.Attribute) and item.attr == "register" for item in function.decorator_list)
