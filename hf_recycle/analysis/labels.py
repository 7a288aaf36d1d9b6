"""Short names for models in tables and figures."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath


def short_labels(labels: Sequence[str], width: int = 32) -> list[str]:
    """The last part of each path or repository, with as many parts before it as it takes to tell them apart; clipped on
    the left to `width` characters. Names that are equal altogether get a number."""
    parts = [PurePath(label).parts or (label,) for label in labels]
    names = list(labels)
    for count in range(1, 1 + max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(set(labels)):
            break
    names = [name if len(name) <= width else f"…{name[1 - width :]}" for name in names]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique
