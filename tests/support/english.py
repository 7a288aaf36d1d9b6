"""A little English, at once: making the built-in corpus takes seconds."""

from pydoc_data.topics import topics


def english(lines: int) -> list[str]:
    """Lines of Python's documentation, each of several words."""
    found = [line.strip() for text in topics.values() for line in text.splitlines() if len(line.split()) > 6]
    return found[:lines]
