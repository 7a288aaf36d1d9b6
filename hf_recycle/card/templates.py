"""The Jinja templates of `model_cards/`."""

from pathlib import Path
from typing import Any

import jinja2


def template_root() -> Path:
    """The folder of the templates: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "model_cards"
    return packaged if packaged.is_dir() else package.parent / "model_cards"


def load_template(name: str, **filters: Any) -> jinja2.Template:
    """A template with its filters. Those that end in `.html.jinja` escape what they are given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_root()),
        autoescape=lambda template: template is not None and template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, **filters}
    return environment.get_template(name)
