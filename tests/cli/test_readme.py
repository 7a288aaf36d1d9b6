"""The README says what the code does."""

from pathlib import Path

from hf_recycle.cli.argument_table import renew

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_arguments_is_that_of_the_code():
    text = README.read_text(encoding="utf-8")
    assert renew(text) == text, "renew it with: python -m hf_recycle.cli.argument_table README.md"
