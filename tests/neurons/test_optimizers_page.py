"""The table of docs/optimizers.md against what each optimizer does: those whose package is installed."""

import re
from pathlib import Path

import pytest
import torch
from transformers.training_args import OptimizerNames

from hf_recycle import RecyclingArguments, RecyclingTrainer, find_feed_forwards
from hf_recycle.neurons.optimizer_state import check_can_reset, check_optimizer, check_was_reset, reset_state

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
TABLE = {name: (reset, why) for name, reset, why in re.findall(r"^\| ([a-z0-9_]+) \| ([a-z ]+) \|(.*)\|$", PAGE, re.M)}


def test_the_page_tells_of_every_optimizer():
    assert list(TABLE) == [*(each.value for each in OptimizerNames), "muon"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the packages
@pytest.mark.parametrize("name", TABLE)
def test_it_tells_the_truth(name, family_named, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles its step
    reset, why = TABLE[name]
    model = family_named("bert").build(d_ff=256)
    args = RecyclingArguments(str(tmp_path), optim=name, optim_target_modules="all-linear", use_cpu=True)
    try:
        make, options = RecyclingTrainer.get_optimizer_cls_and_kwargs(args, model)
        parameters = options.pop("model", None) or options.pop("optimizer_dict", None) or options.pop("params", None)
        optimizer = make(list(model.parameters()) if parameters is None else parameters, **options)
    except (ImportError, ValueError, AssertionError) as error:  # AssertionError: LOMO on a machine without CUDA
        pytest.skip(f"not installed here: {error}")
    if reset == "no method":
        with pytest.raises(ValueError, match=why.strip()):
            check_optimizer(optimizer, "recycle_steps", 1)
        return
    check_optimizer(optimizer, "recycle_steps", 1)
    check_can_reset(optimizer, "keep")
    if reset == "no":
        with pytest.raises(ValueError, match=why.strip()):
            check_can_reset(optimizer, "reset")
        return
    check_can_reset(optimizer, "reset")
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    [block, _] = find_feed_forwards(model)
    count = reset_state(optimizer, block, torch.tensor([1, 5]), "reset")
    check_was_reset(optimizer, [block], count)
    # Two neurons of 16 weights in, a bias and 16 out, in one to three moments.
    expected = {"sgd": [0], "adafactor": [2 * 3], "muon": [2 * (16 + 2 + 16)]}.get(name, [66, 132, 198])
    assert count in expected
    if "in 8 bits" in why:
        entries = optimizer.state[block.slices[0].parameter].values()
        assert any(hasattr(entry, "codes") or getattr(entry, "dtype", None) == torch.uint8 for entry in entries)
