"""Figures of a page that can be looked at closely: their style, and a script of ten kilobytes inside the page.

Panzoom does the zooming (MIT, github.com/timmywil/panzoom, version 4.6.2 of npm's @panzoom/panzoom, unchanged). A
library for plots would add one to five megabytes to every page; ours are SVG, whose values show when a pointer rests
on them.
"""

import base64
import hashlib
import re

from markupsafe import Markup

from hf_recycle.card.templates import template_root


class Zoom:
    """What a template needs.

    Attributes:
        style: for its `<style>`.
        script: for its `<script>`, at the end of the body. Every `svg` in an element of class `frame` can be zoomed.
        policy: a Content-Security-Policy under which that script runs and no other.
    """

    def __init__(self):
        folder = template_root() / "zoom"
        self.style = Markup((folder / "zoom.css").read_text(encoding="utf-8"))
        parts = [(folder / name).read_text(encoding="utf-8") for name in ("panzoom.min.js", "zoom.js")]
        self.script = Markup("\n" + "".join(parts))
        digest = base64.b64encode(hashlib.sha256(self.script.encode("utf-8")).digest()).decode()
        self.policy = Markup(
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        )


def inline_svg(picture: bytes) -> Markup:
    """An SVG of ours as an element of a page, which needs no names of XML."""
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"|<\?xml.*?\?>\s*', "", picture.decode("utf-8")))
