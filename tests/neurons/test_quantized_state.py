"""Optimizers that keep their state in 8 bits: what becomes of reborn neurons, and of those that share a block of codes.

They need torchao and bitsandbytes, which are no requirements of this package.
"""

import pytest
import torch
from torch import nn

from hf_recycle import find_feed_forwards
from hf_recycle.neurons.optimizer_state import check_can_reset, reset_state

RECYCLED = torch.tensor([0, 3, 70])


def torchao(parameters):
    return pytest.importorskip("torchao.optim").AdamW8bit(parameters, lr=1e-3)


def bitsandbytes(name):
    return lambda parameters: getattr(pytest.importorskip("bitsandbytes.optim"), name)(
        parameters, lr=1e-3, optim_bits=8
    )


def read(state):
    """The 8-bit entries of a parameter's state: `{key: (numbers, their scales, the values of all codes)}`."""
    found = {}
    for key, value in state.items():
        if hasattr(value, "codes"):
            codes, qmap, scales = value.codes, value.qmap, value.scale.repeat_interleave(value.block_size)
        elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            codes, qmap = value, state[f"qmap{key[-1]}"]
            scales = state[f"absmax{key[-1]}"].repeat_interleave(256, dim=-1)[..., : codes[0].numel() * len(codes)]
        else:
            continue
        scales = scales.reshape(codes.shape)
        found[key] = qmap[codes.long()] * scales, scales, qmap
    return found


def trained(make, d_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles its step
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_model, 96), nn.ReLU(), nn.Linear(96, d_model))
    optimizer = make(model.parameters())
    for _ in range(3):
        for parameter in model.parameters():
            by_line = torch.rand(parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1))
            parameter.grad = torch.randn(parameter.shape) * by_line
        model[0].weight.grad[RECYCLED] *= 1e-3  # as of dead neurons: less than the mean, whatever the block
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("mode", ["reset", "zero"])
@pytest.mark.parametrize("d_model", [256, 64])
@pytest.mark.parametrize("name", ["torchao", "AdamW", "Lion", "RMSprop", "AdEMAMix"])
def test_reborn_neurons_get_the_nearest_number_and_others_keep_theirs(name, d_model, mode, monkeypatch):
    """A line of 256 numbers is a block of its own; shorter ones, and columns, share blocks with other neurons."""
    model, optimizer = trained(torchao if name == "torchao" else bitsandbytes(name), d_model, monkeypatch)
    parameters = {model[0].weight: False, model[2].weight: True}
    before = {parameter: read(optimizer.state[parameter]) for parameter in parameters}
    count = reset_state(optimizer, find_feed_forwards(model, "0 -> 2")[0], RECYCLED, mode)
    reborn = torch.zeros(96, dtype=torch.bool).index_fill_(0, RECYCLED, True)
    entries = 0
    for parameter, is_out in parameters.items():
        after = read(optimizer.state[parameter])
        assert len(after) == (1 if name in ("Lion", "RMSprop") else 2), "the state must be in 8 bits"
        for key, (new, scales, codes) in after.items():
            old, old_scales, _ = before[parameter][key]
            mine = (reborn if is_out else reborn[:, None]).expand(old.shape)
            second = key in ("exp_avg_sq", "state2") or name == "RMSprop"
            expected = old[~mine].mean() if second and mode == "reset" else torch.zeros(())
            nearest = (codes[:, None] * scales[mine] - expected).abs().amin(0)
            torch.testing.assert_close((new[mine] - expected).abs(), nearest, rtol=0, atol=1e-6 * float(expected))
            if d_model == 256 and not is_out:
                torch.testing.assert_close(new[mine], expected.expand(int(mine.sum())), rtol=1e-6, atol=0)
            same_scale = scales == old_scales
            assert torch.equal(new[~mine & same_scale], old[~mine & same_scale])
            assert (scales >= old_scales)[~mine].all()
            assert ((new - old).abs() <= 0.02 * scales)[~mine].all()
            entries += int(mine.sum())
    biases = 3 * {"Lion": 1, "RMSprop": 1, "AdEMAMix": 3}.get(name, 2)  # those are in float32
    assert count == entries + biases


def test_what_can_not_be_reset_is_refused_with_the_reason():
    parameters = [nn.Parameter(torch.randn(256, 64))]
    paged = bitsandbytes("AdamW")(parameters)
    paged.is_paged = True
    refused = {
        "4-bit second moment": pytest.importorskip("torchao.optim").AdamW4bit(parameters),
        "memory that the device may be writing to": paged,
        "projected gradients": pytest.importorskip("apollo_torch").APOLLOAdamW(parameters),
        "outside of the optimizer's own": pytest.importorskip("grokadamw").GrokAdamW(parameters),
    }
    for why, optimizer in refused.items():
        check_can_reset(optimizer, "keep")
        with pytest.raises(ValueError, match=why):
            check_can_reset(optimizer, "reset")


def test_a_sharded_block_is_refused(monkeypatch):
    model, optimizer = trained(bitsandbytes("AdamW"), 64, monkeypatch)
    [block] = find_feed_forwards(model, "0 -> 2")
    check_can_reset(optimizer, "reset", [block])
    monkeypatch.setattr(type(block.out_slice.storage), "sharded", True)
    with pytest.raises(ValueError, match="AdamW of bitsandbytes: its state can be reset on one process and under DDP"):
        check_can_reset(optimizer, "reset", [block])
