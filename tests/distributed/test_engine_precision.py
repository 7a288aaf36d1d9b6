"""bf16 and fp16 on every engine, against one process in the same precision. Real processes, gloo."""

import functools

import pytest
import torch
from matrix import ENGINES, METHODS
from safetensors.torch import load_file
from support.overflow import POISONED
from test_engines import DISTRIBUTED, launch

# The others differ in which neurons they take, not in how they read and write them; two of them take neurons by their
# activations, which roundings to bf16 change by more than neurons differ, and with copies some differ by less too.
IN_BF16 = ["off", "immunity_matched", "smooth", "regularised", "pruning", "midpoint"]
RUNS = [f"{name}@bf16" if name != "smooth" else "smooth@bf16:resume" for name in IN_BF16]
SCALED = ["smooth@fp16:skip", "smooth@fp16:without"]

# Engines cast at different places (autocast one operation, FSDP2 and DeepSpeed the whole model), so that they differ by
# roundings to bf16, of 2⁻⁹ each. Logits stay below 0.5, which changes a loss by less than 2 · 0.5 · 2⁻⁹; magnitudes are
# those of float32 masters, except that DeepSpeed computes with rounded weights while a neuron is fading in. Masters
# of the others were seen to differ by 1e-4 of a magnitude: choices with a gap of several times that are clear.
LOSS, MAGNITUDE, MARGIN = 2**-9, 2**-8, 2**-11


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """`runs(engine)`: the folder of all the runs of an engine, made once."""
    return functools.cache(
        lambda engine: launch(engine, tmp_path_factory.mktemp(engine), RUNS + SCALED, 1 if engine == "single" else 2)
    )


def outcome(folder, run: str, steps: int = 10) -> tuple[dict, dict]:
    result = torch.load(folder / run / "result.pt", weights_only=False)
    return result, load_file(folder / run / f"checkpoint-{steps}" / "model.safetensors")


def farthest(first: dict, second: dict) -> float:
    """The largest relative difference between the magnitudes of two runs; zero, as of a pruned neuron, only equals
    zero."""
    pairs = [(a, second["magnitudes"][name]) for name, a in first["magnitudes"].items()]
    return max(float(((a - b).abs() / b.clamp(min=1e-12)).max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("method", IN_BF16)
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_bf16_gives_what_one_process_gives(engine, method, runs):
    expected, _ = outcome(runs("single"), f"{method}-bf16")
    found, weights = outcome(runs(engine), f"{method}-bf16")
    assert [row["recycled"] for row in found["history"]] == [row["recycled"] for row in expected["history"]]
    assert found["losses"] == pytest.approx(expected["losses"], abs=LOSS)
    assert found["losses"] != outcome(runs("single"), "off-bf16")[0]["losses"]
    assert farthest(expected, found) < MAGNITUDE
    assert all(values.dtype == torch.float32 for values in found["magnitudes"].values())
    # The tolerance is far from hiding what the method does, and the choices are clear.
    if method != "off":
        assert farthest(expected, outcome(runs("single"), "off-bf16")[0]) > 10 * MAGNITUDE
    if "recycle_steps" in METHODS[method] and method != "pruning":
        assert sum(len(row["recycled"]) for row in found["history"]) > 10
        assert min(found["margins"]) > MARGIN

    deepspeed = engine.startswith("zero")
    assert found["masters"] == ["torch.float32"]
    assert found["parameters"] == ["torch.bfloat16" if deepspeed else "torch.float32"]
    assert {str(value.dtype) for value in weights.values()} == set(found["parameters"])
    # After every step, a phase included, the model computes with the masters, rounded. ZeRO 1 and 2 take the midpoint
    # step on masters and copies apart: rounded twice.
    assert max(found["off"]) <= (1 if engine in ("zero1", "zero2") and method == "midpoint" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_bf16_resumes_in_mid_fade_in(engine, runs):
    whole, resumed = outcome(runs(engine), "smooth-bf16"), outcome(runs(engine), "smooth-bf16-resumed")
    assert whole[0]["losses"] == resumed[0]["losses"]
    assert any("fade_in/new" in key for key in whole[0]["state"])
    for key, values in whole[0]["state"].items():
        assert torch.equal(values, resumed[0]["state"][key]), key
        if "fade_in/new" in key:
            assert values.dtype == torch.float32  # from the masters
    for key, values in whole[1].items():
        assert torch.equal(values, resumed[1][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_steps_that_a_loss_scaler_skips_are_as_if_their_batches_had_never_been(engine, runs):
    """The first one when a phase is due, the others in mid-fade-in; the scaler halves its scale each time, a power
    of two, which changes what is below the resolution of fp16 and nothing else."""
    found, weights = outcome(runs(engine), "smooth-fp16-skip", steps=12)
    expected, expected_weights = outcome(runs(engine), "smooth-fp16-without", steps=9)
    assert (found["skipped"], expected["skipped"]) == (3, 0)
    taken = [loss for step, loss in enumerate(found["losses"], start=1) if step not in POISONED]
    assert taken == pytest.approx(expected["losses"], abs=5e-5)
    # The phases of optimizer steps 3 and 6, which the Trainer counts as its steps 4 and 9.
    assert [row["step"] for row in expected["history"]] == [3, 3, 6, 6]
    assert [row["step"] for row in found["history"]] == [4, 4, 9, 9]
    for key in ("phase", "recycled", "eligible", "requested"):
        assert [row[key] for row in found["history"]] == [row[key] for row in expected["history"]]
    # Only where steps were skipped is it noted how many.
    noted = {f"{block}/skipped_steps" for block in {row["block"] for row in found["history"]}}
    assert found["state"].keys() - noted == expected["state"].keys()
    for key, values in expected["state"].items():
        if values.is_floating_point():
            torch.testing.assert_close(found["state"][key], values, rtol=0, atol=1e-4, msg=key)
        elif not key.endswith(("last_step", "skipped_steps", "last_logged_step")):
            assert torch.equal(found["state"][key], values), key
    for key, values in expected_weights.items():
        rounding = 2**-10 * values.float().abs() if values.dtype == torch.float16 else 0
        assert ((weights[key].float() - values.float()).abs() <= rounding + 1e-4).all(), key
