"""The page on engines says what the tests test."""

from pathlib import Path

import pytest
from engine_table import _cases, engine_table, renew
from matrix import METHODS
from test_engines import DISTRIBUTED

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_table_of_engines_is_that_of_the_tests():
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text, "renew it with: python tests/distributed/engine_table.py docs/engines.md"


def test_it_has_every_method_on_every_engine_that_is_tested():
    rows = [line.split("|")[1:-1] for line in engine_table().splitlines()[2:]]
    of_methods = [row for row in rows if row[0].strip().startswith("same as one process: ")]
    assert len(of_methods) == len(METHODS)
    assert all([cell.strip() for cell in row[1:]] == ["yes"] * len(DISTRIBUTED) for row in of_methods)
    resumes = [row for row in rows if row[0].strip() == "resume in mid fade in"]
    assert [[cell.strip() for cell in row[1:]] for row in resumes] == [["yes"] * len(DISTRIBUTED)]


def test_a_case_that_is_left_out_is_not_in_the_table():
    @pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.skip)])
    @pytest.mark.parametrize(("method", "number"), [("plain", 1), ("off", 2)])
    def test_something(engine, method, number):
        pass

    cases = _cases(test_something)
    assert {case["engine"] for case in cases} == {"ddp"}
    assert sorted((case["method"], case["number"]) for case in cases) == [("off", 2), ("plain", 1)]
