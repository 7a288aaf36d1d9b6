"""Resuming with another number of processes, another engine, another kind of state dict: as if nothing had happened.

One process, DDP and FSDP2 with full and with sharded state dicts take turns on one training; every switch falls into a
fade-in. Real processes, gloo.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_engines import assert_same_outcome, launch, outcome
from transformers import AutoModelForMaskedLM

SCRIPT = Path(__file__).with_name("variant_run.py")

# In the order in which they can run: launch, engine, processes, its runs, and what each resumes from.
LAUNCHES: dict[str, tuple[str, int, dict[str, str | None]]] = {
    "one": ("single", 1, {"whole": None}),
    "ddp": ("ddp", 2, {"from_one": "one/whole/4"}),
    "sharded": (
        "fsdp2_sharded",
        2,
        {"whole": None, "resumed": "sharded/whole/4", "from_one": "one/whole/4", "from_ddp": "ddp/from_one/8"},
    ),
    "full": ("fsdp2", 2, {"from_sharded": "sharded/from_one/8", "from_one": "one/whole/4"}),
    "alone": ("fsdp2_sharded", 1, {"from_full": "full/from_one/8", "from_sharded": "sharded/whole/4"}),
    "one_again": (
        "single",
        1,
        {
            "from_ddp": "ddp/from_one/8",
            "from_sharded": "sharded/from_one/8",
            "from_full": "full/from_one/8",
        },
    ),
}
RUNS = [(launched, run) for launched, (_, _, runs) in LAUNCHES.items() for run in runs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all the runs, `LAUNCH/RUN`."""
    folder = tmp_path_factory.mktemp("resume")
    for launched, (engine, processes, runs) in LAUNCHES.items():
        words = []
        for run, source in runs.items():
            where, _, step = (source or "").rpartition("/")
            words.append(f"{run}=regularised" + (f":{folder / where / f'checkpoint-{step}'}" if source else ""))
        launch(engine, folder / launched, words, processes, script=SCRIPT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("launched", "run"), RUNS[1:])
def test_resume_across_engines_and_process_counts_is_the_same_as_uninterrupted(launched, run, runs):
    found = outcome(runs / launched, run)
    assert ("DTensor" in found[0]["shards"]) == LAUNCHES[launched][0].startswith("fsdp2")
    assert_same_outcome(outcome(runs / "one", "whole"), found)


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """The folder of runs of models that are saved under other names than their modules bear; see `runs`."""
    folder = tmp_path_factory.mktemp("renamed")
    families = ("gpt_neox", "qwen2_moe")
    launch("single", folder / "one", [f"{name}=plain,family={name}" for name in families], 1, script=SCRIPT)
    from_one = [f"{name}=plain,family={name}:{folder / 'one' / name / 'checkpoint-4'}" for name in families]
    launch("fsdp2", folder / "fsdp2", from_one, 2, script=SCRIPT)
    back = [f"{name}=plain,family={name}:{folder / 'fsdp2' / name / 'checkpoint-8'}" for name in families]
    launch("single", folder / "back", back, 1, script=SCRIPT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["fsdp2", "back"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen2_moe"])
def test_weights_under_other_names_cross_engines(family, launched, renamed):
    expected, found = (torch.load(renamed / at / family / "result.pt", weights_only=False) for at in ("one", launched))
    assert found["losses"] == pytest.approx(expected["losses"], abs=5e-6)
    assert [row["recycled"] for row in found["history"]] == [row["recycled"] for row in expected["history"]]
    for block, values in expected["magnitudes"].items():
        torch.testing.assert_close(found["magnitudes"][block], values, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_sharded_state_dicts_resume_to_the_bit(runs):
    whole, resumed = outcome(runs / "sharded", "whole"), outcome(runs / "sharded", "resumed")
    assert whole[0]["losses"] == resumed[0]["losses"]
    for part in (1, 0):
        before, after = (result[part] if part else result[part]["state"] for result in (whole, resumed))
        assert all(torch.equal(values, after[key]) for key, values in before.items())


@pytest.mark.slow
@pytest.mark.parametrize(("launched", "run"), [("sharded", "whole"), ("full", "from_sharded"), ("alone", "from_full")])
def test_plain_transformers_loads_the_checkpoint(launched, run, runs):
    checkpoint = runs / launched / run / "checkpoint-10"
    model, loading = AutoModelForMaskedLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(runs / "one" / "whole" / "checkpoint-10" / "model.safetensors")
    weights = model.state_dict()
    for key, values in expected.items():
        torch.testing.assert_close(weights[key], values, rtol=1e-4, atol=2e-6, msg=key)
