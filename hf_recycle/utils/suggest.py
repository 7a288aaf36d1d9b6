"""What the user may have meant."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], show_all: bool = False) -> str:
    """A clause for an error message: the known word nearest to `word`, or all of them.

    With `show_all` the known words are listed beside the nearest one.
    """
    words = sorted(known)
    # Only the last part of "scale/laptop" may have been typed, and case is no difference.
    folded = {candidate.casefold(): candidate for candidate in words}
    matches = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.55)
    listing = f"known are {', '.join(words)}"
    if not matches:
        return listing
    hint = f"did you mean {folded[matches[0]]}?"
    return f"{hint} ({listing})" if show_all else hint
