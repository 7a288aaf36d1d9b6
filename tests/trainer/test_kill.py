"""`kill -9` at any moment loses nothing but the steps since the last checkpoint."""

import random
from pathlib import Path

import pytest
from support.scripts import run_script


def run(folder: Path, kills: list[int]) -> str:
    result = run_script(Path(__file__).with_name("killable_run.py"), folder, *kills)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path):
    """One step with its save makes about 27 such operations; early kills land in the first step's save, and later
    ones, drawn at random, in every part of later saves and steps."""
    kills = [*range(2, 28, 3), *random.Random(0).choices(range(1, 80), k=8)]
    assert run(tmp_path / "killed", kills) == run(tmp_path / "whole", [])
