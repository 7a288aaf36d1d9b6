"""Muon on several processes: matrices that are whole, and matrices that FSDP2 has sharded."""

from pathlib import Path

import pytest
import torch
from test_engines import launch, outcome

SCRIPT = Path(__file__).with_name("variant_run.py")
RUN = "plain,optim=muon,recycle_fraction=0.25,recycle_selection=random"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("muon")


def run_and_resume(engine, folder, processes):
    where = folder / engine
    return launch(
        engine, where, [f"whole={RUN}", f"resumed={RUN}:{where / 'whole' / 'checkpoint-4'}"], processes, script=SCRIPT
    )


@pytest.fixture(scope="module")
def alone(folder):
    return run_and_resume("single", folder, 1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2_sharded"])
def test_muon_on_two_processes(engine, folder, alone):
    """It orthogonalises in bfloat16, in which sums that are taken in another order differ in the third digit."""
    where = run_and_resume(engine, folder, 2)
    (found, weights), (expected, other) = outcome(where, "whole"), outcome(alone, "whole")
    assert found["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    assert [row["recycled"] for row in found["history"]] == [row["recycled"] for row in expected["history"]]
    counts = [int(result["state"]["trainer/optimizer_entries_reset"]) for result in (found, expected)]
    assert counts[0] == counts[1] > 0
    matrices = [name for name, weight in weights.items() if weight.dim() == 2 and "layer" in name]
    assert len(matrices) == 12
    for name in matrices:  # the steps together are several times as large as the weights were at the start
        assert (weights[name] - other[name]).norm() < 0.03 * other[name].norm(), name
    resumed, weights_of_resumed = outcome(where, "resumed")
    assert resumed["losses"] == found["losses"]
    assert all(torch.equal(weights[name], weights_of_resumed[name]) for name in weights)
