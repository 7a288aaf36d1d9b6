"""The example of docs/sae.md runs, here with its first seed alone, and its numbers are those of the page."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "sae.md").read_text()
LINE = re.compile(r"^([a-z_ ]+), seed (\d): (\d+) dead, ([\d.]+) lost, (\d+) features found$", re.M)


def numbers(text):
    return {(name, seed): (int(dead), float(lost), int(found)) for name, seed, dead, lost, found in LINE.findall(text)}


@pytest.mark.long
def test_the_page_shows_what_its_code_prints(capsys):
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert code.count("for seed in (0, 1):") == 1
    exec(compile(code.replace("(0, 1)", "(0,)"), "docs/sae.md", "exec"), {})
    measured, shown = numbers(capsys.readouterr().out), numbers(PAGE)
    assert measured.keys() == {(name, seed) for name, seed in shown if seed == "0"}
    assert len(measured) == 5
    for run, (dead, lost, found) in measured.items():  # elsewhere sums come in another order
        assert (dead, lost, found) == (
            pytest.approx(shown[run][0], abs=5),
            pytest.approx(shown[run][1], abs=0.05),
            pytest.approx(shown[run][2], abs=6),
        )
    revived, control = measured["low_magnitude", "0"], measured["no recycling", "0"]
    assert revived[0] < control[0] / 2
    assert revived[1] < control[1]
    assert revived[2] > 2 * control[2]
