"""The parts of a composite model: encoder and decoder, or one for each modality."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from hf_recycle.neurons.layers import common_parent


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Part = TypeVar("Part", bound=_Named)


def of_tower(parts: Sequence[Part], wanted: str, *, required: bool = True) -> list[Part]:
    """Those of some blocks whose path, as far as the first number in it, has `wanted` as a name or a word of a name.

    Raises:
        ValueError: if none is found and one is `required`.
    """
    chosen = [part for part in parts if wanted in _words(part.name)]
    if required and not chosen:
        raise ValueError(
            f"ff_blocks={wanted!r} names no part of the model: "
            + (f"name one of {', '.join(names)}." if (names := towers(parts)) else "it has one part, leave it out.")
        )
    return chosen


def towers(parts: Sequence[_Named]) -> list[str]:
    """Names of the modules in which the paths of some blocks part; none if they lie in one list of layers."""
    depth = len([name for name in common_parent([part.name for part in parts]).split(".") if name])
    names = dict.fromkeys("".join(part.name.split(".")[depth : depth + 1]) for part in parts)
    return [] if any(not name or name.isdigit() for name in names) else list(names)


def _words(path: str) -> set[str]:
    words = set()
    for name in path.split("."):
        if name.isdigit():
            break
        words |= {name, *name.split("_")}
    return words
