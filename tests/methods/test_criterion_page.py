"""The examples of docs/add-a-criterion.md: registered as they stand there, and run through the generic tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = """
from hf_recycle.methods.recycling import births, selection

for module, code in {examples!r}:
    exec(code, vars({{"selection": selection, "births": births}}[module]))
"""


def examples() -> list[tuple[str, str]]:
    """The module that each block of Python belongs into, and the block."""
    text = (ROOT / "docs" / "add-a-criterion.md").read_text(encoding="utf-8")
    modules = {"CRITERIA": "selection", "REINITIALIZATIONS": "births"}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [(modules[found[1]], block) for block in blocks if (found := re.search(r"@(\w+)\.register", block))]


@pytest.mark.slow
def test_the_examples_pass_the_generic_tests(tmp_path):
    names = [re.search(r"^def (\w+)", code, re.MULTILINE)[1] for _, code in examples()]
    assert len(names) >= 2
    (tmp_path / "examples_of_contributing.py").write_text(PLUGIN.format(examples=examples()))
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "examples_of_contributing",
        "-o",
        "addopts=-v",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', ROOT)}"}
    done = subprocess.run(
        [*words, "-o", "addopts=-v", "-k", " or ".join(names), str(ROOT / "tests" / "methods")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for name in names:
        assert re.search(rf"\[.*{name}.*\] PASSED", done.stdout), name
