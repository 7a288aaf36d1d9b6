"""A causal model, its head in chunks, on two processes of every engine gives what it gives on one; and that is what the
stock Trainer gives, as `tests/trainer/test_causal.py` shows."""

import functools
import math
from pathlib import Path

import causal_run
import pytest
import torch
from causal_run import MIDDLE, RUNS, STEPS
from safetensors.torch import load_file
from test_engines import DISTRIBUTED, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """`runs(engine)`: the folder of all the runs of an engine, made once."""
    script = Path(causal_run.__file__)
    return functools.cache(
        lambda engine: launch(
            engine, tmp_path_factory.mktemp(engine), list(RUNS), 1 if engine == "single" else 2, script=script
        )
    )


def outcome(folder: Path, name: str) -> tuple[dict, dict]:
    result = torch.load(folder / name / "result.pt", weights_only=False)
    return result, load_file(folder / name / f"checkpoint-{STEPS}" / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_two_processes_give_what_one_gives(engine, name, runs):
    (expected, weights), (found, others) = outcome(runs("single"), name), outcome(runs(engine), name)
    assert found["head"] == expected["head"] == "ChunkedHead"
    half = name == "bf16"
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2 if half else 1e-5)
    assert found["evaluation"]["loss"] == pytest.approx(expected["evaluation"]["loss"], rel=1e-2 if half else 1e-4)
    assert math.log(found["evaluation"]["perplexity"]) == pytest.approx(found["evaluation"]["loss"])
    assert [row["recycled"] for row in found["history"]] == [row["recycled"] for row in expected["history"]]
    if not half:  # engines round at other places
        assert found["evaluation"]["accuracy"] == pytest.approx(expected["evaluation"]["accuracy"], abs=0.02)
        for key, value in weights.items():
            torch.testing.assert_close(others[key].float(), value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("engine", ["single", *DISTRIBUTED])
def test_resumes_to_the_bit(engine, runs):
    (whole, weights), (resumed, others) = outcome(runs(engine), "recycled"), outcome(runs(engine), "resumed")
    assert resumed["losses"][-(STEPS - MIDDLE) :] == whole["losses"][-(STEPS - MIDDLE) :]
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
