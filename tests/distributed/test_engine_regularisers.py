"""L2 to the initial weights and shrink and perturb on several processes."""

from pathlib import Path

import pytest
import torch
from test_engines import launch, outcome

SCRIPT = Path(__file__).with_name("variant_run.py")
L2 = "off,l2_init_weight=3"
PERTURB = "off,shrink_perturb_steps=3,shrink_perturb_keep=0.7"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("regularisers")


@pytest.fixture(scope="module")
def alone(folder):
    return launch("single", folder / "single", [f"l2={L2}", f"perturb={PERTURB}", "off=off"], 1, script=SCRIPT)


def assert_same(one, other):
    (found, weights), (expected, others) = one, other
    assert found["losses"] == pytest.approx(expected["losses"], abs=5e-6)
    for name in weights.keys() & others.keys():
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_come_to_what_one_does(engine, folder, alone):
    where = folder / engine
    start = alone / "l2" / "checkpoint-4"
    words = [f"l2={L2}", f"crossed={L2}:{start}", f"resumed={L2}:{where / 'l2' / 'checkpoint-4'}", f"perturb={PERTURB}"]
    launch(engine, where, words, 2, script=SCRIPT)
    assert outcome(alone, "l2")[0]["losses"] != pytest.approx(outcome(alone, "off")[0]["losses"], abs=1e-3)
    for name in ("l2", "crossed", "resumed"):
        assert_same(outcome(where, name), outcome(alone, "l2"))
    if engine == "ddp":
        assert_same(outcome(where, "perturb"), outcome(alone, "perturb"))
    else:
        error = (where / "perturb.error").read_text()
        assert "shrink_perturb_steps=3 can't be used with weights that FSDP2, tensor parallelism or" in error


def test_deepspeed_is_refused(folder):
    where = launch("zero2", folder / "zero2", [f"l2={L2}", f"perturb={PERTURB}"], 2, script=SCRIPT)
    assert "l2_init_weight=3 can't be used with DeepSpeed, which updates copies" in (where / "l2.error").read_text()
    assert "has sharded, because fresh ones are drawn whole" in (where / "perturb.error").read_text()
