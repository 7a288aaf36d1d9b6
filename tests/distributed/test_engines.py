"""Every engine gives what one process gives on the same global batch. Real processes, gloo."""

import functools
from pathlib import Path

import pytest
import torch
from matrix import ENGINES, LAYOUTS, METHODS
from safetensors.torch import load_file
from support.scripts import run_script

from hf_recycle.records.files import read_config
from hf_recycle.speed.onednn import is_available

SCRIPT = Path(__file__).with_name("engine_run.py")
DISTRIBUTED = [name for name in ENGINES if name != "single"]
# Resumed in mid-fade-in: the hardest case.
RUNS = [
    *(name if name != "regularised" else "regularised:resume" for name in METHODS),
    "off:accumulate",
    "smooth:economical",
    *LAYOUTS,
]
# A tied weight is saved once, under a name that depends on the engine.
TIED = ("decoder.weight", "decoder.bias", "cls.predictions.bias", "lm_head.weight")


def launch(
    engine: str, folder: Path, words: list[str], processes: int, fails: bool = False, script: Path = SCRIPT
) -> Path | str:
    """Runs `engine_run.py`; returns the folder, or what the processes said if the run has to fail."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (make test installs it)")
    result = run_script(script, processes, engine, folder, *words, OMP_NUM_THREADS="1")
    # The traceback of the process that failed first.
    told = "\n".join([line for line in result.stderr.splitlines() if line.startswith("[rank")][-80:])
    if fails:
        assert result.returncode != 0
        return told
    assert result.returncode == 0, told or result.stderr[-6000:]
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """`runs(engine)`: the folder of all the runs of an engine, made once."""
    return functools.cache(
        lambda engine: launch(engine, tmp_path_factory.mktemp(engine), RUNS, 1 if engine == "single" else 2)
    )


def outcome(folder: Path, method: str) -> tuple[dict, dict]:
    """The result of a run and its final weights, as plain transformers would load them."""
    result = torch.load(folder / method / "result.pt", weights_only=False)
    return result, load_file(folder / method / "checkpoint-10" / "model.safetensors")


def assert_same_outcome(expected, found, rounding=1e-5):
    (expected, expected_weights), (found, found_weights) = expected, found
    # Integers are identical, floats equal to rounding.
    assert [row["recycled"] for row in found["history"]] == [row["recycled"] for row in expected["history"]]
    assert found["activity"] == expected["activity"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=5e-6)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)
    assert found["state"].keys() == expected["state"].keys()
    for key, values in expected["state"].items():
        if values.is_floating_point():
            # The running loss is that of the last step.
            torch.testing.assert_close(found["state"][key], values, rtol=1e-5, atol=1e-6, msg=key)
        else:
            assert torch.equal(found["state"][key], values), key
    for key, values in expected["magnitudes"].items():
        torch.testing.assert_close(found["magnitudes"][key], values, rtol=rounding, atol=1e-8, msg=key)
    common = expected_weights.keys() & found_weights.keys()
    assert all(key.endswith(TIED) for key in expected_weights.keys() ^ found_weights.keys())
    assert len(common) >= 14  # of the smallest model
    for key in common:
        torch.testing.assert_close(found_weights[key], expected_weights[key], rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_same_as_one_process(engine, method, runs):
    found = outcome(runs(engine), method)
    expected_engine = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    assert found[0]["engine"] == expected_engine
    assert ("DTensor" in found[0]["shards"]) == (engine == "fsdp2")
    if "recycle_steps" in METHODS[method]:
        assert sum(len(row["recycled"]) for row in found[0]["history"]) > 10
    # Least squares multiplies roundings by the condition of its matrix, up to 100 with its damping; 1.2e-5 was seen.
    assert_same_outcome(outcome(runs("single"), method), found, 1e-4 if method == "surgeon" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_other_layouts_give_what_one_process_gives(engine, layout, runs):
    """Pruning, smooth recycling and the midpoint loss at once."""
    found = outcome(runs(engine), layout)
    assert ("DTensor" in found[0]["shards"]) == (engine == "fsdp2")
    assert sum(len(row["recycled"]) for row in found[0]["history"]) > 10
    assert_same_outcome(outcome(runs("single"), layout), found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_a_run_tells_of_all_its_processes(engine, runs):
    found, expected = (read_config(runs(name) / "plain" / "checkpoint-10")["run"] for name in (engine, "single"))
    assert found["hardware"]["processes"] == 2
    assert found["tokens"] == expected["tokens"] > 0
    assert found["model"] == expected["model"]
    assert (runs(engine) / "plain" / "checkpoint-10" / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_accumulation_is_part_of_the_batch(engine, runs):
    """Uneven numbers of masked tokens in every part: means of parts would differ."""
    assert_same_outcome(outcome(runs("single"), "off"), outcome(runs(engine), "off-accumulated"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_gradient_checkpointing(engine, runs):
    found = outcome(runs(engine), "smooth-economical")
    assert_same_outcome(outcome(runs("single"), "smooth"), found)
    by_onednn = found[0]["products by oneDNN"] > 0
    assert by_onednn == (is_available() and not engine.startswith("zero"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("plain:disagree", "the processes disagree about recycle_fraction: process 0 has 0.1, process 1 has 0.5"),
        ("plain:drift", "The processes disagree about the neurons recycled at step 3"),
    ],
)
def test_processes_that_disagree_are_stopped(word, message, tmp_path):
    assert message in launch("ddp", tmp_path, [word], processes=2, fails=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_resume_in_mid_fade_in(engine, runs):
    whole, resumed = outcome(runs(engine), "regularised"), outcome(runs(engine), "regularised-resumed")
    assert (whole[0]["state"]["trainer/phases"] == 3).all()
    # These engines are deterministic on the CPU: to the bit.
    assert whole[0]["losses"] == resumed[0]["losses"]
    for key, values in whole[1].items():
        assert torch.equal(values, resumed[1][key]), key
    for key, values in whole[0]["state"].items():
        assert torch.equal(values, resumed[0]["state"][key]), key


@pytest.mark.slow
def test_a_loss_that_is_infinite_in_one_batch_of_one_process_skips_the_phase_of_all(tmp_path):
    found = torch.load(
        launch("ddp", tmp_path, ["plain:infinite"], 2) / "plain-infinite" / "result.pt", weights_only=False
    )
    rows = [(row["step"], len(row["recycled"]), row["note"]) for row in found["history"]]
    assert rows[:2] == [(3, 0, "skipped: the loss is not finite")] * 2
    assert all(recycled for _, recycled, _ in rows[2:])
