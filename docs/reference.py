"""The pages that are made from the code: docs/arguments.md, docs/methods.md and docs/commands.md.

`python docs/reference.py` (`make reference`) renews them.
"""

import contextlib
import dataclasses
import io
import os
from pathlib import Path

from transformers import TrainingArguments

from benchmarks.pages import renew_between
from hf_recycle.arguments import RecyclingArguments
from hf_recycle.cli.main import COMMANDS, main
from hf_recycle.methods.folding import FOLDED
from hf_recycle.methods.registry import CRITERIA, FOLDS, REINITIALIZATIONS, STATISTICS, needs_of

DOCS = Path(__file__).parent


def renewed_pages() -> dict[Path, str]:
    """What each page should say."""
    parts = {
        "arguments.md": {"arguments": _arguments()},
        "methods.md": {
            "criteria": _registered(CRITERIA),
            "births": _registered(REINITIALIZATIONS),
            "folds": _folds(),
            "statistics": _table("statistic", {name: (what,) for name, what in STATISTICS.items()}, "what"),
        },
        "commands.md": {"commands": _commands()},
    }
    pages = {}
    for page, contents in parts.items():
        pages[DOCS / page] = (DOCS / page).read_text(encoding="utf-8")
        for name, content in contents.items():
            pages[DOCS / page] = renew_between(pages[DOCS / page], name, content)
    return pages


def _arguments() -> str:
    """A row for each argument that `RecyclingArguments` adds to `TrainingArguments`."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    rows = {}
    for field in dataclasses.fields(RecyclingArguments):
        if field.name not in inherited:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = " ".join(default) if isinstance(default, list) else default
            rows[field.name] = ("`seed`" if field.name.endswith("_seed") else f"`{default}`", field.metadata["help"])
    return _table("argument", rows, "default", "meaning")


def _registered(registry) -> str:
    """A table of the functions of a registry, with the first lines of their docstrings."""
    rows = {}
    for name in registry:
        what = (registry[name].__doc__ or "").strip().splitlines()[0]
        rows[name] = (what[0].upper() + what[1:], ", ".join(f"`{each}`" for each in sorted(needs_of(registry[name]))))
    return _table("name", rows, "what", "statistics it needs")


def _folds() -> str:
    rows = {name: (FOLDED[name] or "nothing", ", ".join(f"`{n}`" for n in sorted(FOLDS[name]))) for name in FOLDS}
    return _table("name", rows, "what removed neurons did is", "statistics it needs")


def _table(first: str, rows: dict[str, tuple[str, ...]], *columns: str) -> str:
    lines = [f"| {' | '.join((first, *columns))} |", "|---" * (1 + len(columns)) + "|"]
    for name, cells in rows.items():
        escaped = (cell.replace("|", r"\|") for cell in cells)
        lines.append(f"| `{name}` | {' | '.join(escaped)} |")
    return "\n".join(lines)


def _commands() -> str:
    """A section for each command, with its help."""
    os.environ["COLUMNS"] = "100"
    parts = []
    for name in COMMANDS:
        help_text = io.StringIO()
        with contextlib.redirect_stdout(help_text):
            main([name, "--help"])
        parts.append(f"\n## hf-recycle {name}\n\n```text\n{help_text.getvalue().strip()}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    for page, text in renewed_pages().items():
        page.write_text(text, encoding="utf-8")
