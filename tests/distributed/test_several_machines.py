"""Machines that share no disk: each can go on from what it has saved itself, or the training is refused."""

import json
from pathlib import Path

import pytest
from support.scripts import run_script


@pytest.mark.slow
def test_every_machine_resumes_from_its_own_checkpoint(tmp_path):
    done = run_script(Path(__file__).with_name("machines_run.py"), tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for rank, other in (0, 1), (1, 0):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {"model.safetensors", "optimizer.pt", "recycling_state.safetensors", f"rng_state_{rank}.pth"} <= set(
            found["files"]
        )
        assert f"rng_state_{other}.pth" not in found["files"]
        assert found["same weights"]
        assert found["recycled"] > 0
        assert "is not shared by all machines" in found["without"]
        assert "leave save_on_each_node out" in found["shared"]
        assert not found["left"]
