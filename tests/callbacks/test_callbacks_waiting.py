"""In an ordinary step no method waits for the device: whatever a number's value decides would be such a wait."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_recycle import MidpointLossCallback
from hf_recycle.methods.recycling.fade_in import blend_weights, restore_new_weights, scale_gradients
from hf_recycle.methods.recycling.phase import run_phase
from hf_recycle.methods.schedule import PhaseSchedule
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.table import NeuronTable

_aten = torch.ops.aten
_WAITS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal}


class Waits(TorchDispatchMode):
    """Which operations wait, on tensors that a model on an accelerator would have there."""

    def __init__(self, on_device):
        super().__init__()
        self.on_device, self.found = on_device, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in _WAITS and args[0].dtype in self.on_device:
            self.found.append(function)
        if function.overloadpacket is _aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def model(plain_net):
    made = plain_net(d_ff=20, layers=3)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    return made


def fading_in(model, smooth_steps):
    table = NeuronTable.of(model)
    settings = RecyclingSettings(steps=1, fraction=0.2, seed=0)
    run_phase(table, settings, PhaseSchedule(1, 1, 9, 10, 0.2), 1, smooth_steps=smooth_steps)
    assert table.fading_in == 12
    return table


def test_it_would_be_seen():
    with Waits({torch.float32}) as waits:
        values = torch.ones(3)
        bool(values[0] > 0)  # a bool on the host side is none of the model's
        float(values[0])
        values[values > 0]
    assert [function.overloadpacket for function in waits.found] == [_aten._local_scalar_dense, _aten.index]


@pytest.mark.parametrize("center", ["mean", "median"])
@pytest.mark.parametrize("log", [False, True])
def test_a_midpoint_step_does_not_wait(model, center, log):
    fading_in(model, 5)
    callback = MidpointLossCallback(weight=0.1, center=center, log=log)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = SimpleNamespace(global_step=1, max_steps=9)
    callback.on_train_begin(SimpleNamespace(seed=0), state, None, model=model, optimizer=optimizer)
    for _ in range(2):  # the first one looks whether it has an effect, once
        optimizer.step()
        before = model.blocks[0].second.weight.detach().clone()
        with Waits({torch.float32, torch.bool}) as waits:
            callback.on_step_end(None, state, None)
        assert not torch.equal(before, model.blocks[0].second.weight)
    assert waits.found == []


def test_a_step_of_neurons_in_transition_does_not_wait(model):
    table = fading_in(model, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first one looks up where the neurons lie
        before = model.blocks[0].second.weight.detach().clone()
        with Waits({torch.float32}) as waits:
            scale_gradients(table, 5)
            restore_new_weights(table)
            optimizer.step()
            blend_weights(table, 5, advance=True)
        assert not torch.equal(before, model.blocks[0].second.weight)
    assert waits.found == []
