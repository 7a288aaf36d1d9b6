"""The table of docs/arguments.md, made from the settings.

`python -m hf_recycle.cli.argument_table docs/arguments.md` renews it; `make reference` does all such pages.
"""

import dataclasses
import sys
from pathlib import Path

from transformers import TrainingArguments

from hf_recycle.arguments import RecyclingArguments


def argument_table() -> str:
    """Markdown: one row for each argument that `RecyclingArguments` adds to `TrainingArguments`."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(RecyclingArguments):
        if field.name not in inherited:
            meaning = field.metadata["help"].replace("|", "\\|")
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = " ".join(default) if isinstance(default, list) else default
            default = "`seed`" if field.name.endswith("_seed") else f"`{default}`"
            rows.append(f"| `{field.name}` | {default} | {meaning} |")
    return "\n".join(rows)


def renew(text: str) -> str:
    """`text` with what lies between the markers replaced by the table."""
    return renew_between(text, "arguments", argument_table())


def renew_between(text: str, name: str, content: str) -> str:
    """`text` with what lies between the markers `<!-- name: begin -->` and `<!-- name: end -->` replaced."""
    before, begin, rest = text.partition(f"<!-- {name}: begin -->")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not begin or not end:
        raise ValueError(f"the text has no <!-- {name}: begin --> ... <!-- {name}: end -->")
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(renew(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
