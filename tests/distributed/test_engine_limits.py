"""The edges of the engines: more processes than neurons, offloading, what is communicated, ZeRO's checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import METHODS
from test_engines import assert_same_outcome, launch, outcome

SCRIPT = Path(__file__).with_name("variant_run.py")
NARROW = ["immunity_matched", "smooth", "midpoint"]  # three neurons for four processes
WIDE = ["smooth", "midpoint"]  # whose communication is measured
LAST = "save_steps=10"  # nobody reads what would be saved earlier
EXPERTS = f"experts=smooth,family=mixtral,{LAST}"  # the weights of all experts of a layer lie in one parameter
D_FF, WIDTH, BLOCKS = 64, 16, 2


def _words(prefix: str, methods: list[str], d_ff: int, fraction: float, more: str = "") -> list[str]:
    return [
        f"{prefix}_{method}={method},d_ff={d_ff},{LAST}"
        + (f",recycle_fraction={fraction}" if "recycle_steps" in METHODS[method] else "")
        + more
        for method in methods
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("limits")


@pytest.fixture(scope="module")
def expected(folder):
    """Every run on one process."""
    narrow, wide = _words("narrow", NARROW, 3, 0.34), _words("wide", WIDE, D_FF, 0.03125)
    return launch("single", folder / "single", [*narrow, *wide, "smooth=smooth", EXPERTS], 1, script=SCRIPT)


@pytest.fixture(scope="module", params=["fsdp2", "zero3"])
def narrow(request, folder):
    words = [*_words("narrow", NARROW, 3, 0.34), EXPERTS]
    return launch(request.param, folder / request.param, words, 4, script=SCRIPT)


@pytest.fixture(scope="module", params=["fsdp2", "zero3_own_optimizer"])
def measured(request, folder):
    words = _words("wide", WIDE, D_FF, 0.03125, more=",measured=1")
    return launch(request.param, folder / f"measured_{request.param}", words, 2, script=SCRIPT)


@pytest.fixture(scope="module")
def offloaded(folder):
    return launch("zero2_offload", folder / "zero2_offload", ["smooth=smooth", EXPERTS], 2, script=SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("method", NARROW)
def test_shards_without_neurons(method, narrow, expected):
    found = outcome(narrow, f"narrow_{method}")
    if "recycle_steps" in METHODS[method]:
        assert sum(len(row["recycled"]) for row in found[0]["history"]) >= 4
    assert_same_outcome(outcome(expected, f"narrow_{method}"), found)


def assert_same_experts(expected, found):
    expected, found = outcome(expected, "experts"), outcome(found, "experts")
    assert [bool(row["recycled"]) for row in found[0]["history"]] == [True] * 3 * 8  # phases, experts
    for result, _ in (expected, found):
        result["evaluation"] = {}  # of a causal model it is the stock Trainer's: a mean over batches
    assert_same_outcome(expected, found)


@pytest.mark.slow
def test_experts_in_shards(narrow, expected):
    assert_same_experts(expected, narrow)


@pytest.mark.slow
@pytest.mark.parametrize("method", WIDE)
def test_what_is_communicated_and_held(method, measured, expected):
    """Magnitudes cost O(d_ff), recycled neurons their own weights, and no process makes more than a shard."""
    assert_same_outcome(outcome(expected, f"wide_{method}"), outcome(measured, f"wide_{method}"))
    events = json.loads((measured / f"wide_{method}" / "measured.json").read_text())
    assert events["Magnitudes.after_step"]["communicated"] >= BLOCKS * 2 * D_FF  # something was measured
    fade_ins = 2 * BLOCKS * 2 * (2 * WIDTH + 1)  # two generations of two neurons in each block
    norms = BLOCKS * 2 * D_FF
    for name, event in events.items():
        few = {"Recycling.after_optimizer_step": 0, "Recycling.before_step": 0}.get(name, norms)
        assert event["communicated"] <= few + (fade_ins if method != "midpoint" else 0) + 32, name
        assert event["largest"] <= WIDTH * D_FF // 2, name


@pytest.mark.slow
def test_optimizer_on_the_cpu(offloaded, expected):
    assert_same_outcome(outcome(expected, "smooth"), outcome(offloaded, "smooth"))
    assert_same_experts(expected, offloaded)


@pytest.mark.slow
def test_parameters_on_the_cpu(folder, offloaded, expected):
    checkpoint = offloaded / "smooth" / "checkpoint-4"
    words = ["smooth=smooth", f"refused=smooth:{checkpoint}"]
    found = launch("zero3_offload", folder / "zero3_offload", words, 2, script=SCRIPT)
    assert_same_outcome(outcome(expected, "smooth"), outcome(found, "smooth"))
    # Every process says why it stops.
    first, second = (found / "refused.error").read_text().splitlines()
    assert first == second
    assert "was written by ZeRO stage 1 or 2 and this run has stage 3" in first


@pytest.mark.slow
def test_universal_checkpoint_with_another_number_of_processes(folder, offloaded, expected):
    """As the refusal tells."""
    checkpoint = offloaded / "smooth" / "checkpoint-4"
    partitions = checkpoint / "global_step4"
    command = ["--input_folder", partitions, "--output_folder", f"{partitions}_universal", "--inject_missing_state"]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *command], check=True, capture_output=True
    )
    found = launch("zero2_universal", folder / "universal", [f"smooth=smooth:{checkpoint}"], 1, script=SCRIPT)
    assert_same_outcome(outcome(expected, "smooth"), outcome(found, "smooth"))
