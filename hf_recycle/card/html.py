"""A run as one HTML page that needs nothing beside it: no script, no file, no network.

Its figures are SVG inside the page: sharp at any size, with values that show when a pointer rests on them and a box to
enlarge each. A library for plots would do no more for them, and adds one to five megabytes of script to every page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from hf_recycle.card.citation import CITATION
from hf_recycle.card.comparisons import comparisons
from hf_recycle.card.facts import FIGURES, block_columns
from hf_recycle.card.limitations import limitations
from hf_recycle.card.templates import load_template


def render_report(facts: Mapping[str, Any], pictures: Mapping[str, bytes], title: str) -> str:
    """The page.

    Args:
        facts: see `facts.card_facts`; every text in them is escaped.
        pictures: the figures, {name of the card's file: SVG}, as `plots.run.figure_pictures` makes them.
        title: what the run is called.
    """
    shown = {name: what for name, what in FIGURES.items() if name in pictures}
    page = load_template("report.html.jinja").render(
        facts={**facts, "figures": shown},
        pictures={name: _inside(picture) for name, picture in pictures.items()},
        title=title,
        columns=block_columns(facts),
        comparisons=comparisons(facts),
        limitations=limitations(facts),
        citation=CITATION,
    )
    return page.lstrip()


def _inside(picture: bytes) -> Markup:
    """An SVG of ours as an element of a page, which needs no names of XML."""
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"|<\?xml.*?\?>\s*', "", picture.decode("utf-8")))
