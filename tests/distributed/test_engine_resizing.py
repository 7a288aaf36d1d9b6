"""A resized checkpoint goes on alike on every engine that can read it, whichever of them wrote what was resized."""

from pathlib import Path

import pytest
from test_engines import assert_same_outcome, launch, outcome

from hf_recycle.analysis.resize import ResizeSettings, values_for
from hf_recycle.analysis.resize_checkpoint import resize_checkpoint

SCRIPT = Path(__file__).with_name("variant_run.py")
WIDTH = 40
ENGINES = {"ddp": "ddp", "fsdp2": "fsdp2"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs `LAUNCH/RUN` of 32 neurons to step 4, in a fade-in, and of 40 from there."""
    folder = tmp_path_factory.mktemp("resizing")
    for engine, processes in (("single", 1), ("fsdp2", 2), ("fsdp2_sharded", 2)):
        launch(engine, folder / "before" / engine, ["whole=smooth"], processes, script=SCRIPT)
        resize_checkpoint(
            folder / "before" / engine / "whole" / "checkpoint-4",
            folder / "resized" / engine / "checkpoint-4",
            lambda model, blocks: values_for(model, blocks, WIDTH),
            ResizeSettings(birth="split"),
        )
    words = [
        f"from_{engine}=smooth,d_ff={WIDTH}:{folder / 'resized' / engine / 'checkpoint-4'}"
        for engine in ("single", "fsdp2", "fsdp2_sharded")
    ]
    launch("single", folder / "single", words, 1, script=SCRIPT)
    for engine in ENGINES:
        launch(engine, folder / engine, words[:1], 2, script=SCRIPT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resized_checkpoint_goes_on_as_on_one_process(engine, runs):
    found = outcome(runs / engine, "from_single")
    assert ("DTensor" in found[0]["shards"]) == (engine == "fsdp2")
    assert found[1]["bert.encoder.layer.0.intermediate.dense.weight"].shape == (WIDTH, 16)
    assert_same_outcome(outcome(runs / "single", "from_single"), found)


@pytest.mark.slow
@pytest.mark.parametrize("written_by", ["fsdp2", "fsdp2_sharded"])
def test_what_fsdp2_wrote_is_resized_alike(written_by, runs):
    assert_same_outcome(outcome(runs / "single", "from_single"), outcome(runs / "single", f"from_{written_by}"))
