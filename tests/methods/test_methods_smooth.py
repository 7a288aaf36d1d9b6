"""Smooth recycling against the explicit parametrisation x = α·x_new + (1 − α)·stop_grad(x_old), through autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_recycle.methods.recycling.fade_in import (
    blend_weights,
    interpolation,
    mix,
    restore_new_weights,
    scale_gradients,
)
from hf_recycle.methods.recycling.phase import run_phase
from hf_recycle.methods.schedule import PhaseSchedule
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.table import NeuronTable

STEPS, SMOOTH, D, FF = 50, 15, 5, 12
ADAMW = {"lr": 3e-2, "weight_decay": 0.1}
MAX_NORM = 0.05


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, FF), nn.Tanh(), nn.Linear(FF, D)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(8, D, generator=generator, dtype=torch.float64) for _ in range(2))


class Explicit:
    """The same network, with trainable x_new and constant x_old kept apart and mixed inside the forward pass."""

    def __init__(self, model: nn.Sequential):
        names = ("w_in", "b_in", "w_out", "b_out")
        self.new = {n: p.detach().clone().requires_grad_() for n, p in zip(names, model.parameters(), strict=True)}
        self.old = {n: p.detach().clone() for n, p in self.new.items()}
        self.started = torch.full((FF,), -math.inf, dtype=torch.float64)
        self.done = 0  # optimizer steps
        self.optimizer = torch.optim.AdamW(self.new.values(), **ADAMW)

    def effective(self) -> dict[str, torch.Tensor]:
        alpha = torch.clamp((self.done - self.started) / SMOOTH, max=1.0)
        by_neuron = {"w_in": alpha[:, None], "b_in": alpha, "w_out": alpha[None, :], "b_out": torch.ones(())}
        return {n: a * self.new[n] + (1 - a) * self.old[n].detach() for n, a in by_neuron.items()}

    def loss(self, step: int) -> torch.Tensor:
        x, y = batch(step)
        w = self.effective()
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, w["w_in"], w["b_in"])), w["w_out"], w["b_out"]), y)

    @torch.no_grad()
    def recycle(self, index: torch.Tensor, values: dict[str, torch.Tensor], state: str) -> None:
        for name, now in self.effective().items():
            lines = {"w_in": (index,), "b_in": (index,), "w_out": (slice(None), index)}.get(name)
            if lines is None:
                continue
            self.old[name][lines] = now[lines]
            fresh = values[{"w_in": "in", "b_in": "in.bias", "w_out": "out"}[name]]
            self.new[name][lines] = fresh.T if name == "w_out" else fresh
            if state != "keep":
                moments = self.optimizer.state[self.new[name]]
                others = torch.ones(FF, dtype=torch.bool)
                others[index] = False
                kept = moments["exp_avg_sq"][:, others] if name == "w_out" else moments["exp_avg_sq"][others]
                moments["exp_avg"][lines] = 0
                moments["exp_avg_sq"][lines] = kept.mean() if state == "reset" else 0
        self.started[index] = self.done

    def step(self) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.new.values(), MAX_NORM))
        self.optimizer.step()
        self.done += 1
        return norm


@pytest.mark.parametrize("state", ["keep", "reset", "zero"])
@pytest.mark.parametrize("skipped", [(), (8, 9, 30)])
def test_fifty_steps_of_clipped_adamw(state, skipped):
    """Phases at steps 4, 11 and 20 overlap (15 steps of interpolation each), so that neurons are fading in with
    different α; weights and losses agree to 1e-10, and clipping bites at every step."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    explicit = Explicit(model)
    table = NeuronTable.of(model)
    settings = RecyclingSettings(
        steps=1, fraction=0.25, selection="random", reinit="matched_normal", optimizer_state=state, seed=3
    )
    ages_together = set()
    for step in range(1, STEPS + 1):
        x, y = batch(step)
        loss, reference = F.mse_loss(model(x), y), explicit.loss(step)
        assert float(loss.detach()) == pytest.approx(float(reference.detach()), abs=1e-10)
        optimizer.zero_grad()
        explicit.optimizer.zero_grad()
        loss.backward()
        reference.backward()
        advance = step not in skipped

        scale_gradients(table, SMOOTH)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        restore_new_weights(table)
        if advance:
            optimizer.step()
        blend_weights(table, SMOOTH, advance=advance)
        if advance:
            assert norm == pytest.approx(explicit.step(), abs=1e-10)
            assert norm > MAX_NORM

        if step in (4, 11, 20):
            before = [p.detach().clone() for p in model.parameters()]
            schedule = PhaseSchedule(1, step, STEPS, STEPS + 1, settings.fraction)
            (record,) = run_phase(table, settings, schedule, step, smooth_steps=SMOOTH, optimizer=optimizer)
            assert len(record.chosen) == 3
            # Right after the phase the weights are still the old ones, exactly.
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            fade_in = table.states[0].fade_in
            fresh = fade_in.age == 0
            assert fade_in.index[fresh].tolist() == record.chosen
            _, new = fade_in.lines(table.blocks[0])
            values = {role: v[fresh] for role, v in new.items()}
            explicit.recycle(torch.tensor(record.chosen), values, state)
        if table.states[0].fade_in is not None:
            ages_together.add(len(table.states[0].fade_in.age.unique()))
        for parameter, expected in zip(model.parameters(), explicit.effective().values(), strict=True):
            torch.testing.assert_close(parameter, expected, atol=1e-10, rtol=0, check_dtype=True)
    assert {1, 2} <= ages_together, "fade-ins of different age must have overlapped"
    assert table.states[0].fade_in is None
    assert int((table.states[0].counts > 0).sum()) >= 6


def start(model, age=0, smooth_steps=4):
    """One fade-in of neurons 2 and 7 of `net`."""
    table = NeuronTable.of(model)
    settings = RecyclingSettings(steps=1, fraction=2 / 12, seed=0)
    schedule = PhaseSchedule(1, 1, 10, 100, 0.1667)
    (record,) = run_phase(table, settings, schedule, 1, smooth_steps=smooth_steps)
    assert len(record.chosen) == 2
    return table, torch.tensor(record.chosen)


def test_alpha_reaches_one_after_exactly_the_steps_asked_for():
    """j optimizer steps after the phase α is j / steps; at the last it is x_new to the bit and over."""
    model = net()
    table, index = start(model, smooth_steps=4)
    block, state = table.blocks[0], table.states[0]
    old, new = block.read(index), state.fade_in.lines(block)[1]
    for j in (1, 2, 3):
        restore_new_weights(table)
        assert all(torch.equal(v, new[role]) for role, v in block.read(index).items())
        blend_weights(table, 4, advance=True)
        for role, values in block.read(index).items():
            torch.testing.assert_close(values, j / 4 * new[role] + (1 - j / 4) * old[role], atol=1e-15, rtol=0)
        assert state.fading_in().nonzero().flatten().tolist() == index.tolist()
    restore_new_weights(table)
    blend_weights(table, 4, advance=True)
    assert all(torch.equal(v, new[role]) for role, v in block.read(index).items())
    assert state.fade_in is None
    assert not state.fading_in().any()


def test_a_skipped_step_advances_nothing_and_changes_nothing():
    model = net()
    table, _ = start(model)
    restore_new_weights(table)
    blend_weights(table, 4, advance=True)
    weights = [p.detach().clone() for p in model.parameters()]
    age = table.states[0].fade_in.age.clone()
    for _ in range(3):
        restore_new_weights(table)
        blend_weights(table, 4, advance=False)
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert torch.equal(table.states[0].fade_in.age, age)


def test_only_gradients_of_neurons_in_transition_are_scaled():
    model = net()
    table, index = start(model)
    for _ in range(3):
        restore_new_weights(table)
        blend_weights(table, 4, advance=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    scale_gradients(table, 4)
    expected = torch.ones(FF, dtype=torch.float64)
    expected[index] = 0.75
    w_in, b_in, w_out, b_out = (p.grad for p in model.parameters())
    assert torch.equal(w_in, expected[:, None].expand(FF, D))
    assert torch.equal(b_in, expected)
    assert torch.equal(w_out, expected[None].expand(D, FF))
    assert torch.equal(b_out, torch.ones_like(b_out))


def test_parameters_without_gradient_are_fine():
    model = net()
    table, _ = start(model)
    scale_gradients(table, 4)


def test_one_step_of_interpolation():
    """The forward pass right after the phase is the old one; after one optimizer step it is over."""
    model = net()
    table, index = start(model, smooth_steps=1)
    _, new = table.states[0].fade_in.lines(table.blocks[0])
    restore_new_weights(table)
    blend_weights(table, 1, advance=True)
    assert table.states[0].fade_in is None
    assert all(torch.equal(v, new[role]) for role, v in table.blocks[0].read(index).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mix_is_exact_at_both_ends(dtype):
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(3, 40, generator=generator).to(dtype) for _ in range(2))
    mixed = mix(new, old, torch.tensor([0.0, 1.0, 0.5]))
    assert mixed.dtype == dtype
    assert torch.equal(mixed[0], old[0])
    assert torch.equal(mixed[1], new[1])
    torch.testing.assert_close(mixed[2].double(), (new[2].double() + old[2].double()) / 2, rtol=4e-3, atol=1e-3)
    assert mix(new[:, 0], old[:, 0], torch.tensor([0.0, 1.0, 0.5])).shape == (3,)


def test_mix_rounds_each_product_once():
    """To the bit, so that a run can go on with another version of the package."""
    generator = torch.Generator().manual_seed(0)
    new, old, alpha = (torch.randn(size, generator=generator) for size in [(40, 7), (40, 7), (40,)])
    expected = [[float(a) * x for x in row] for a, row in zip(alpha, new.double().tolist(), strict=True)]
    rest = [[float(1 - a) * x for x in row] for a, row in zip(alpha, old.double().tolist(), strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64).float() + torch.tensor(rest, dtype=torch.float64).float()
    assert torch.equal(mix(new, old, alpha.double()), expected)


def test_interpolation():
    assert interpolation(torch.tensor([0, 1, 3, 4, 9]), 4).tolist() == [0, 0.25, 0.75, 1, 1]
    # α of the last step is 1 for every number of steps, never 0.999….
    for steps in range(1, 2000):
        assert interpolation(torch.tensor([steps]), steps).item() == 1.0
        assert interpolation(torch.tensor([steps - 1]), steps).item() < 1.0
