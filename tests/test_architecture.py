"""The rules of the tree (docs/design.md): nothing imports upwards or in a circle, and help needs no torch."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = (
    *("errors", "internals", "utils", "neurons", "hub.checks", "hub", "records", "engines", "speed", "batches", "mlm"),
    *("methods", "arguments", "plots", "card", "trainer.base", "hub.push", "hub.pull", "checkpoints", "trainer"),
    *("data", "runs", "analysis", "studies", "cli", "train"),
)
"""From the bottom to the top: a folder imports only what stands before it. `hf_recycle/__init__.py` imports lazily."""


def modules() -> dict[str, Path]:
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("hf_recycle/**/*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, at its top and in functions."""
    known, found = modules(), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports by dots"
                found[name] |= {
                    inner if (inner := f"{node.module}.{alias.name}") in known else node.module for alias in node.names
                }
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] &= known.keys() - {name}
    return found


def level(module: str) -> int:
    """The level of the longest name of `LEVELS` that `module` lies in."""
    inside = module.removeprefix("hf_recycle.")
    return LEVELS.index(max((n for n in LEVELS if f"{inside}.".startswith(f"{n}.")), key=len))


def test_nothing_imports_upwards():
    upwards = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others - {"hf_recycle"}
        if module != "hf_recycle" and level(other) > level(module)
    ]
    assert not upwards


def test_no_module_imports_one_that_imports_it():
    graph = {module: others - {"hf_recycle"} for module, others in imports().items() if module != "hf_recycle"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_what_users_import_lies_at_the_top():
    top = {path.stem for path in ROOT.glob("hf_recycle/*.py")}
    assert top == {"__init__", "arguments", "errors", "train"}


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import hf_recycle", ("torch", "huggingface_hub", "httpx2", "psutil", "matplotlib", "deepspeed", "pandas")),
        pytest.param("import hf_recycle.trainer.trainer", ("matplotlib", "deepspeed"), marks=pytest.mark.slow),
        ("import hf_recycle.methods.settings", ("torch", "transformers")),
    ],
)
def test_imports_are_light(statement, without):
    code = f"import sys; {statement}; sys.exit(' '.join(name for name in {without} if name in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["docs/design.md", "docs/engines.md", "docs/scaling.md", "CONTRIBUTING.md"])
def test_the_files_that_a_page_names_exist(page):
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / page).read_text(encoding="utf-8")))
    missing = {name for name in named if not (ROOT / name).is_file() and not (ROOT / "hf_recycle" / name).is_file()}
    assert not missing


def test_every_folder_is_on_the_page_of_the_tree():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert [name for name in LEVELS if f"`{name.replace('.', '/')}" not in page] == []
