"""`kill -9` at any moment loses nothing but the steps since the last checkpoint."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, kills: list[int]) -> str:
    script = Path(__file__).with_name("killable_run.py")
    result = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, kills)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path):
    """One step with its save makes about 27 such operations; early kills land in the first step's save, and later
    ones, drawn at random, in every part of later saves and steps."""
    kills = [*range(2, 28, 3), *random.Random(0).choices(range(1, 80), k=8)]
    assert run(tmp_path / "killed", kills) == run(tmp_path / "whole", [])
