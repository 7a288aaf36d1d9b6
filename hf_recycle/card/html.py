"""A run as one HTML page that needs nothing beside it: no file, no network."""

from collections.abc import Mapping
from typing import Any

from hf_recycle.card.caveats import comparisons, limitations
from hf_recycle.card.citation import CITATION
from hf_recycle.card.facts import FIGURES, block_columns
from hf_recycle.card.templates import load_template
from hf_recycle.card.zoom import Zoom, inline_svg


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
        pictures={name: inline_svg(picture) for name, picture in pictures.items()},
        title=title,
        columns=block_columns(facts),
        comparisons=comparisons(facts),
        limitations=limitations(facts),
        citation=CITATION,
        zoom=Zoom(),
    )
    return page.lstrip()
