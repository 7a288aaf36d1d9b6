"""`MidpointLossCallback` on a stock Trainer: the step W − lr · weight · ∇Loss, and with which learning rate."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from hf_recycle import MidpointLossCallback, RecyclingCallback
from hf_recycle.methods.recycling.phase import run_phase
from hf_recycle.methods.schedule import PhaseSchedule
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.table import NeuronTable

PEAK, STEPS = 1e-2, 30


class Spy(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def gradient(weights, **variant):
    """Of the mean-centered loss over both blocks, by autograd; `l2` is the square, else the absolute value."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = 0
    for layer in range(2):
        prefix = f"bert.encoder.layer.{layer}"
        w_in, w_out = leaves[f"{prefix}.intermediate.dense.weight"], leaves[f"{prefix}.output.dense.weight"]
        magnitudes = torch.sqrt((w_in**2).sum(1) * (w_out**2).sum(0))
        values = magnitudes.log() if variant.get("log") else magnitudes
        distance = values - values.mean().detach()
        loss = loss + (distance**2).sum() if variant.get("distance") == "l2" else loss + distance.abs().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.item(), dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("variant", [{}, {"distance": "l2"}, {"log": True}])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_step_and_its_learning_rate(bert, train, variant, schedule):
    """A linear schedule falls to zero: step t was taken with lr · (1 − (t − 1) / 30), not with the next one."""
    before, after = Spy(), Spy()
    callback = MidpointLossCallback(weight=0.3, **variant)
    train(bert.double(), [before, callback, after], lr_scheduler_type=schedule, learning_rate=PEAK)
    for step in (1, 2, 17, STEPS):
        loss, gradients = gradient(before.weights[step], **variant)
        rate = PEAK * (1 - (step - 1) / STEPS) if schedule == "linear" else PEAK
        for name, old in before.weights[step].items():
            new = after.weights[step][name]
            if gradients[name] is None:
                assert torch.equal(new, old), name
            else:
                torch.testing.assert_close(new, old - rate * 0.3 * gradients[name], rtol=0, atol=1e-12)
                assert not torch.equal(new, old)
    assert callback.scalars()["midpoint_loss"] == pytest.approx(loss, rel=1e-6)


def test_weight_decay_groups_each_have_their_rate(bert):
    """A frozen matrix has no rate, and does not move."""
    model = bert.double()
    layer = model.bert.encoder.layer[0]
    frozen = layer.intermediate.dense.weight
    optimizer = torch.optim.SGD([{"params": [layer.output.dense.weight], "lr": 0.5}], lr=0.1)
    callback = MidpointLossCallback(weight=1.0)
    before = copy.deepcopy(model.state_dict())
    step(callback, model, optimizer)
    _, gradients = gradient({n: before[n] for n, _ in model.named_parameters()})
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(model.state_dict()[name], before[name] - 0.5 * gradients[name], rtol=0, atol=1e-12)
    assert torch.equal(frozen, before["bert.encoder.layer.0.intermediate.dense.weight"])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n != name)


class State:
    global_step, max_steps = 0, 10


class Resumed(State):
    global_step = 1


def step(callback, model, optimizer, skipped=False, state=State):
    """The events of one optimizer step, by hand. Without gradients, the optimizer itself moves nothing."""
    callback.on_train_begin(SimpleNamespace(seed=0), state, None, model=model, optimizer=optimizer)
    if not skipped:
        optimizer.step()
    callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    callback.on_step_end(None, state, None, model=model, optimizer=optimizer)


def test_neurons_in_transition_are_left_out_of_sum_and_center(bert):
    model = bert.double()
    table = NeuronTable.of(model)
    run_phase(
        table,
        RecyclingSettings(steps=1, fraction=0.25, selection="high_magnitude", seed=0),
        PhaseSchedule(1, 1, 9, 10, 0.25),
        1,
        smooth_steps=5,
    )
    assert table.fading_in == 20
    before = copy.deepcopy(model.state_dict())
    callback = MidpointLossCallback(weight=1.0, distance="l2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(callback, model, optimizer, state=Resumed)  # which does not forget the fade-ins
    assert callback.table is table
    assert table.fading_in == 20
    for layer, state in enumerate(table.states):
        prefix = f"bert.encoder.layer.{layer}"
        w_in = before[f"{prefix}.intermediate.dense.weight"].clone().requires_grad_()
        w_out = before[f"{prefix}.output.dense.weight"].clone().requires_grad_()
        rest = [i for i in range(40) if i not in state.fade_in.index.tolist()]
        magnitudes = torch.sqrt((w_in[rest] ** 2).sum(1) * (w_out[:, rest] ** 2).sum(0))
        ((magnitudes - magnitudes.mean().detach()) ** 2).sum().backward()
        after = model.state_dict()
        for name, leaf in (("intermediate", w_in), ("output", w_out)):
            expected = leaf.detach() - 0.1 * leaf.grad
            torch.testing.assert_close(after[f"{prefix}.{name}.dense.weight"], expected, rtol=0, atol=1e-12)
            assert float(leaf.grad.abs().max()) > 0


def test_with_smooth_recycling_in_one_training(bert, train):
    """Weights fading in are those without the midpoint loss right before its step: it never touches them."""
    before, after = Spy(), Spy()
    recycling = RecyclingCallback(steps=10, fraction=0.2, smooth_steps=8)
    seen = {}

    class Transitions(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            mask = NeuronTable.of(model).states[0].fading_in()
            seen[state.global_step] = mask.nonzero().flatten().tolist()

    train(bert.double(), [before, Transitions(), MidpointLossCallback(weight=0.3), after, recycling])
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    moved = {}
    for number in range(1, STEPS + 1):
        rows = (before.weights[number][name] != after.weights[number][name]).any(dim=1)
        moved[number] = sorted(set(range(40)) - set(rows.nonzero().flatten().tolist()))
        assert moved[number] == seen[number]
    assert [step for step, neurons in seen.items() if neurons] == [*range(11, 18), *range(21, 28)]


def test_a_skipped_optimizer_step_is_no_midpoint_step(bert):
    model = bert.double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(MidpointLossCallback(weight=1.0), model, optimizer, skipped=True)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    fused = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    fused.grad_scale, fused.found_inf = None, torch.tensor(1.0)  # called all the same
    step(MidpointLossCallback(weight=1.0), model, fused)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    step(MidpointLossCallback(weight=1.0), model, optimizer)
    assert not all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_dead_neurons_stay_dead_and_harm_nobody(bert, train):
    dense = bert.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        dense.weight[3] = 0
    optimizer = torch.optim.SGD(bert.parameters(), lr=0.1)
    for log in (False, True):
        step(MidpointLossCallback(weight=1.0, log=log), bert, optimizer)
        assert all(p.isfinite().all() for p in bert.parameters())
        assert not dense.weight[3].any()


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 10}])
def test_a_weight_too_small_for_float32_is_said_once(bert, train, caplog, schedule):
    model = copy.deepcopy(bert)
    with caplog.at_level(logging.WARNING):
        tiny = train(model, [MidpointLossCallback(weight=1e-7)], learning_rate=1e-3, **schedule).model
    said = [record for record in caplog.records if "midpoint_weight=1e-07 changes no weight" in record.getMessage()]
    assert len(said) == 1
    reference = train(model, learning_rate=1e-3, **schedule).model
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 10}, {"warmup_steps": 10, "lr_scheduler_type": "cosine"}])
def test_a_weight_that_matters_is_not_said_to_do_nothing(bert, train, caplog, schedule):
    """Not in the first step of a warm-up either, whose learning rate is zero."""
    with caplog.at_level(logging.WARNING):
        train(bert, [MidpointLossCallback(weight=1e-2)], **schedule)
    assert not [record for record in caplog.records if "changes no weight" in record.getMessage()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused(bert, train, dtype):
    with pytest.raises(ValueError, match=f"midpoint_weight=0.1 can't be used with {dtype} weights"):
        train(bert.to(dtype), [MidpointLossCallback(weight=0.1)])


def test_switched_off_it_does_nothing(bert, train):
    callback = MidpointLossCallback(weight=0)
    off, reference = train(bert, [callback]).model, train(bert).model
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), reference.parameters(), strict=True))
    assert callback.scalars() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "weight=-1 is not allowed: it must be a number >= 0"),
        ({"weight": float("inf")}, "weight=inf is not allowed"),
        ({"weight": "1e-7"}, "weight='1e-7' is not allowed"),
        ({"distance": "l3"}, "distance='l3' is not allowed: it must be one of l1, l2"),
        ({"center": "mode"}, "center='mode' is not allowed: it must be one of mean, median"),
        ({"log": "yes"}, "log='yes' is not allowed: it must be true or false"),
        ({"below_only": 1}, "below_only=1 is not allowed: it must be true or false"),
    ],
)
def test_a_value_that_is_not_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        MidpointLossCallback(**settings)


def test_an_unknown_setting():
    with pytest.raises(TypeError, match="wieght"):
        MidpointLossCallback(wieght=1)
