"""A run as one HTML page that needs nothing beside it: no script, no file, no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from hf_recycle.card.facts import FIGURES, block_columns
from hf_recycle.card.limitations import limitations
from hf_recycle.card.templates import load_template


def render_report(facts: Mapping[str, Any], images: Mapping[str, bytes], title: str) -> str:
    """The page.

    Args:
        facts: see `hub.card_facts.card_facts`; every text in them is escaped.
        images: the figures, {name of the file: PNG}, as `report.figures.figure_images` makes them.
        title: what the run is called.
    """
    shown = {name: what for name, what in FIGURES.items() if name in images}
    sources = {name: f"data:image/png;base64,{base64.b64encode(image).decode()}" for name, image in images.items()}
    page = load_template("report.html.jinja").render(
        facts={**facts, "figures": shown},
        images=sources,
        title=title,
        columns=block_columns(facts),
        limitations=limitations(facts),
    )
    return page.lstrip()
