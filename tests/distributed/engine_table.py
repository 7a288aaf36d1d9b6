"""What works on which engine, read off the tests' own parameters.

`python tests/distributed/engine_table.py docs/engines.md` renews the table of that page.
"""

import importlib
import inspect
import itertools
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from matrix import ENGINES, LAYOUTS, METHODS

from benchmarks.pages import renew_between

SEVERAL = [name for name in ENGINES if name != "single"]


def engine_table() -> str:
    """Markdown: a row for each thing tested on engines, a column for each engine of several processes."""
    titles = [ENGINES[name].title for name in SEVERAL]
    lines = [f"| tested | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for what, engines in _rows().items():
        lines.append(f"| {what} | {' | '.join('yes' if name in engines else '' for name in SEVERAL)} |")
    return "\n".join(lines)


def _rows() -> dict[str, set[str]]:
    """What is tested -> the engines it is tested on."""
    rows: dict[str, set[str]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name, test in inspect.getmembers(importlib.import_module(path.stem), inspect.isfunction):
            if name.startswith("test_"):
                for case in _cases(test):
                    engines = {value for value in case.values() if isinstance(value, str) and value in ENGINES}
                    if engines:
                        rows.setdefault(_label(name, case), set()).update(engines)
    return rows


def _cases(test) -> list[dict[str, object]]:
    """The arguments of every case of a parametrized test that is not skipped."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
            choices.append(
                [dict(zip(names, _values(value, len(names)), strict=True)) for value in values if _runs(value)]
            )
    return [dict(itertools.chain.from_iterable(part.items() for part in case)) for case in itertools.product(*choices)]


def _runs(value: object) -> bool:
    return not any(mark.name in ("skip", "xfail") for mark in getattr(value, "marks", ()))


def _values(value: object, count: int) -> tuple:
    if hasattr(value, "marks"):  # pytest.param
        return value.values
    return (value,) if count == 1 else tuple(value)


def _label(name: str, case: dict[str, object]) -> str:
    words = name.removeprefix("test_").replace("_", " ")
    layout, method = case.get("layout"), case.get("method")
    if layout in LAYOUTS:
        return f"{words}: {layout} (`{LAYOUTS[layout]}`)"
    if method not in METHODS:
        return words
    settings = ", ".join(f"`{key}={value}`" for key, value in METHODS[method].items())
    return f"{words}: {method.replace('_', ' and ')}{f' ({settings})' if settings else ''}"


def renew(text: str) -> str:
    """`text` with its table renewed."""
    return renew_between(text, "engines", engine_table())


if __name__ == "__main__":
    for page in sys.argv[1:]:
        Path(page).write_text(renew(Path(page).read_text(encoding="utf-8")), encoding="utf-8")
