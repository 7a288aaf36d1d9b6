"""Overtraining on two processes gives what one process gives on the same global batches. Real processes, gloo."""

import functools
from pathlib import Path

import pytest
from overtraining_run import RUNS
from test_engines import assert_same_outcome, launch, outcome

SCRIPT = Path(__file__).with_name("overtraining_run.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(engine)`: where all its runs are, made once."""

    @functools.cache
    def make(engine):
        processes = 1 if engine == "single" else 2
        return launch(engine, tmp_path_factory.mktemp(engine), list(RUNS), processes, script=SCRIPT)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_overtraining_is_the_same_as_on_one_process(engine, name, folders):
    expected, found = outcome(folders("single"), name), outcome(folders(engine), name)
    assert found[0]["engine"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[engine]
    assert ("DTensor" in found[0]["shards"]) == (engine == "fsdp2")
    # Not at step 10, where the learning rate is 0.
    assert int(found[0]["state"]["trainer/overtrain_samples"]) == 4 * 3 * 8
    assert int(found[0]["state"]["trainer/overtrain_tokens"]) == 4 * 3 * 8 * 12
    assert_same_outcome(expected, found)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(folders, tmp_path):
    middle = folders("ddp") / "random" / "checkpoint-5"
    launch("single", tmp_path, [f"random:{middle}"], 1, script=SCRIPT)
    expected, found = outcome(folders("single"), "random"), outcome(tmp_path, "random")
    found[0]["losses"] = found[0]["losses"][-len(expected[0]["losses"]) :]
    assert_same_outcome(expected, found)


@pytest.mark.slow
def test_deepspeed_is_refused(tmp_path):
    launch("zero2", tmp_path, ["all"], 2, script=SCRIPT)
    assert (tmp_path / "all.error").read_text().startswith("overtrain_steps can't be used with DeepSpeed")
