"""Optimizer state of reborn neurons, against masks written out entry by entry."""

import copy

import pytest
import torch
import transformers
from torch import nn

from hf_recycle import find_feed_forwards
from hf_recycle.neurons.optimizer_state import (
    StepWatch,
    check_can_reset,
    check_was_reset,
    reset_state,
    unwrap_optimizer,
)
from hf_recycle.trainer.muon import MuonWithAdamW


def muon(parameters):
    parameters = list(parameters)
    return MuonWithAdamW(parameters, hidden=[parameter for parameter in parameters if parameter.dim() == 2])


def of_package(module, name, **options):
    """An optimizer of a package that need not be installed."""
    return lambda parameters: getattr(pytest.importorskip(module), name)(parameters, **{"lr": 1e-3, **options})


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": torch.optim.Adagrad,
    "adafactor-torch": torch.optim.Adafactor,
    "adafactor": lambda p: transformers.Adafactor(p, beta1=0.9),
    "muon": muon,
    "stable_adamw": of_package("optimi", "StableAdamW", triton=False),
    "lion": of_package("lion_pytorch", "Lion"),
    "adamw_bnb_32bit": of_package("bitsandbytes.optim", "AdamW", optim_bits=32),
    "lion_32bit": of_package("bitsandbytes.optim", "Lion", optim_bits=32),
    "rmsprop_bnb_32bit": of_package("bitsandbytes.optim", "RMSprop", optim_bits=32),
}
FIRST_MOMENTS = {"exp_avg", "momentum_buffer", "grad_avg", "state1"}
SECOND_MOMENTS = {
    "state2",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "sum",
    "variance",
    "row_var",
    "col_var",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
}
FAMILIES = ("bert", "gpt2", "modernbert", "llama", "t5-relu")
RECYCLED = torch.tensor([1, 5, 41])


def owners(family, model):
    """Of every parameter: which neuron of block 0 each entry belongs to (-1: none), and which matrix it is in."""
    neuron = {p: torch.full(p.shape, -1) for p in model.parameters()}
    matrix = {p: torch.zeros(p.shape, dtype=torch.int64) for p in model.parameters()}
    holder = model.get_submodule(family.block_names[0])
    for path in family.ins:
        linear = holder.get_submodule(path)
        for parameter in (p for p in (linear.weight, linear.bias) if p is not None):
            rows = parameter.shape[1 if family.transposed and parameter.dim() == 2 else 0]
            numbers = torch.arange(rows) % 42
            half = torch.arange(rows) // 42
            if parameter.dim() == 2:
                numbers, half = (t[None] if family.transposed else t[:, None] for t in (numbers, half))
            neuron[parameter][...] = numbers
            matrix[parameter][...] = half
    out = holder.get_submodule(family.out).weight
    neuron[out][...] = torch.arange(42)[:, None] if family.transposed else torch.arange(42)
    return neuron, matrix


def of_state(entry: torch.Tensor, key: str, like: torch.Tensor):
    """The part of an owner map that a state tensor is about; None where it averages over neurons."""
    if entry.dim() == 2 and like.numel() != entry.numel():
        over_columns = key in ("row_var", "exp_avg_sq_row")
        line = entry[:, 0] if over_columns else entry[0]
        constant = (entry == (line[:, None] if over_columns else line)).all()
        return line.reshape(like.shape) if constant else None
    return entry


def trained(family, make_optimizer, steps=3):
    model = family.build()
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1 + 0.05
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("mode", ["reset", "zero", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("family_name", FAMILIES)
def test_exactly_the_recycled_neurons_change(family_named, family_name, name, mode):
    family = family_named(family_name)
    model, optimizer = trained(family, OPTIMIZERS[name])
    weights = copy.deepcopy(model.state_dict())
    before = {p: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    neuron, matrix = owners(family, model)
    count = reset_state(optimizer, find_feed_forwards(model)[0], RECYCLED, mode)

    touched, number = set(), 0
    # One state of bitsandbytes' RMSprop is its second moment.
    firsts = FIRST_MOMENTS - ({"state1"} if "rmsprop" in name else set())
    seconds = SECOND_MOMENTS | ({"state1"} if "rmsprop" in name else set())
    for parameter, state in before.items():
        assert optimizer.state[parameter].keys() == state.keys()
        for key, old in state.items():
            new, expected = optimizer.state[parameter][key], old
            if isinstance(old, torch.Tensor) and key in firsts | seconds and mode != "keep":
                who = of_state(neuron[parameter], key, old)
                expected = old.clone()
                for half in () if who is None else (0, 1):
                    which = of_state(matrix[parameter], key, old)
                    reborn = torch.isin(who, RECYCLED) & (which == half)
                    others = (who >= 0) & ~torch.isin(who, RECYCLED) & (which == half)
                    if reborn.any():
                        touched.add(key)
                        number += int(reborn.sum())
                        second = key in seconds and mode == "reset"
                        expected[reborn] = old[others].mean() if second else 0.0
            if isinstance(old, torch.Tensor):
                torch.testing.assert_close(new, expected, rtol=1e-6, atol=0, msg=lambda m, k=key: f"{k}: {m}")
                same = new == old
                assert bool(same.all()) == (torch.equal(expected, old))
            else:
                assert new == old
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert count == number
    if mode != "keep" and name != "sgd":
        # Nothing that the optimizer keeps was overlooked.
        of_neurons = [state for parameter, state in before.items() if (neuron[parameter] >= 0).any()]
        kept = {k for s in of_neurons for k, v in s.items() if isinstance(v, torch.Tensor) and v.numel() > 1}
        assert touched == kept


def test_gate_and_up_have_their_own_means(family_named):
    family = family_named("modernbert")
    model, optimizer = trained(family, torch.optim.AdamW)
    wi = model.get_submodule(family.block_names[0]).Wi.weight
    optimizer.state[wi]["exp_avg_sq"][:42] = 2.0
    optimizer.state[wi]["exp_avg_sq"][42:] = 8.0
    optimizer.state[wi]["exp_avg_sq"][RECYCLED] = 100.0
    reset_state(optimizer, find_feed_forwards(model)[0], RECYCLED, "reset")
    second = optimizer.state[wi]["exp_avg_sq"]
    assert torch.equal(second[:42], torch.full_like(second[:42], 2.0))
    assert torch.equal(second[42:], torch.full_like(second[42:], 8.0))


def test_all_neurons_reborn_takes_the_mean_of_the_old_ones(family_named):
    family = family_named("bert")
    model, optimizer = trained(family, torch.optim.AdamW)
    weight = model.get_submodule(family.block_names[0]).intermediate.dense.weight
    mean = optimizer.state[weight]["exp_avg_sq"].mean()
    reset_state(optimizer, find_feed_forwards(model)[0], torch.arange(42), "reset")
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], mean.expand(42, 16))


def test_an_optimizer_that_has_not_stepped_yet(family_named):
    model = family_named("bert").build()
    optimizer = torch.optim.AdamW(model.parameters())
    reset_state(optimizer, find_feed_forwards(model)[0], RECYCLED, "reset")
    assert len(optimizer.state) == 0


class Wrapped:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Unknown(torch.optim.Optimizer):
    """Unknown, with state of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("mine", torch.ones_like(parameter))


class AdamWithMore(torch.optim.Adam):
    """A subclass of a known one that keeps more than is known."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("slow_weights", parameter.detach().clone())


@pytest.mark.parametrize("make", [Unknown, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adamax])
@pytest.mark.parametrize("mode", ["reset", "zero"])
def test_an_unknown_optimizer_is_refused(family_named, make, mode):
    family = family_named("bert")
    model, optimizer = trained(family, make)
    before = copy.deepcopy(optimizer.state_dict())
    message = f"recycle_optimizer_state='reset' or 'zero' can't be used with {make.__name__}.*'keep'.*Adafactor"
    with pytest.raises(ValueError, match=message):
        check_can_reset(Wrapped(optimizer), mode)
    with pytest.raises(ValueError, match=message):
        reset_state(optimizer, find_feed_forwards(model)[0], RECYCLED, mode)
    check_can_reset(optimizer, "keep")
    reset_state(optimizer, find_feed_forwards(model)[0], RECYCLED, "keep")
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][index][key]), torch.as_tensor(value))


class Elsewhere(torch.optim.Adam):
    """A subclass of a known one that keeps its state in a place of its own."""

    def step(self, closure=None):
        super().step(closure)
        self.mine = dict(self.state)
        self.state.clear()


def test_a_state_in_which_nothing_is_found_is_an_error(family_named):
    """But an optimizer that keeps none, or none of a block without gradients, has none to be reset."""
    model, optimizer = trained(family_named("bert"), Elsewhere)
    [block, other] = find_feed_forwards(model)
    assert reset_state(optimizer, block, RECYCLED, "reset") == 0
    with pytest.raises(ValueError, match=r"with Elsewhere .*: nothing of its state was found to reset"):
        check_was_reset(optimizer, [block], 0)
    model, optimizer = trained(family_named("bert"), OPTIMIZERS["sgd"])
    check_was_reset(optimizer, find_feed_forwards(model), 0)
    model, optimizer = trained(family_named("bert"), torch.optim.Adam)
    [block, other] = find_feed_forwards(model)
    check_was_reset(optimizer, [block], 1)
    for piece in other.slices:
        del optimizer.state[piece.parameter]
    check_was_reset(optimizer, [other], 0)
    with pytest.raises(ValueError, match="nothing of its state was found"):
        check_was_reset(optimizer, [block, other], 0)


@pytest.mark.parametrize("mode", ["reset", "zero"])
def test_a_subclass_with_unknown_state_is_refused(family_named, mode):
    model, optimizer = trained(family_named("bert"), AdamWithMore)
    with pytest.raises(ValueError, match=r"AdamWithMore .*: its state 'slow_weights' is unknown"):
        reset_state(optimizer, find_feed_forwards(model)[0], RECYCLED, mode)


def test_known_optimizers_pass_the_check_and_unwrap(family_named):
    parameters = list(family_named("bert").build().parameters())
    for make in OPTIMIZERS.values():
        for mode in ("reset", "zero", "keep"):
            check_can_reset(Wrapped(Wrapped(make(parameters))), mode)
    inner = torch.optim.SGD(parameters)
    assert unwrap_optimizer(Wrapped(Wrapped(inner))) is inner


# ---- StepWatch ----


def watched(optimizer_class=torch.optim.SGD, wrap=lambda optimizer: optimizer, lr=0.25, **options):
    """A block whose in-rows, out-columns and biases are in a group of rate `lr / 2`, in one of `lr`, and nowhere."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = [{"params": [model[0].weight], "lr": lr / 2}, {"params": [model[2].weight]}]
    optimizer = optimizer_class(groups, lr=lr, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return find_feed_forwards(model)[0], optimizer, StepWatch(wrap(optimizer))


def rates(watch, block):
    return {piece.role: float(watch.rate(piece)) for piece in block.slices}


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: Wrapped(Wrapped(o))])
def test_each_slice_has_the_rate_of_its_group(wrap):
    """A parameter that is not optimized has rate 0."""
    block, optimizer, watch = watched(wrap=wrap)
    assert rates(watch, block) == {"in": 0, "in.bias": 0, "out": 0}
    optimizer.step()
    assert rates(watch, block) == {"in": 0.125, "in.bias": 0, "out": 0.25}
    watch.reset()
    assert rates(watch, block) == {"in": 0, "in.bias": 0, "out": 0}


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_rate_is_that_of_the_step_not_the_next_one(as_tensor):
    """The scheduler has moved on when the rate is asked for; a rate that is a tensor it changes in place."""
    lr = torch.tensor(0.25, dtype=torch.float64) if as_tensor else 0.25
    block, optimizer, watch = watched(torch.optim.Adam, lr=lr, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 2.0, 0.0][step])
    for factor in (1.0, 0.5, 2.0):
        watch.reset()
        optimizer.step()
        scheduler.step()
        assert rates(watch, block) == {"in": 0.125 * factor, "in.bias": 0, "out": 0.25 * factor}


def test_highest_rate():
    """What a schedule starts from, or warms up to; without a schedule, the rate."""
    block, optimizer, watch = watched()
    assert {piece.role: watch.highest_rate(piece) for piece in block.slices} == {"in": 0.125, "in.bias": 0, "out": 0.25}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    for _ in range(3):
        assert {p.role: watch.highest_rate(p) for p in block.slices} == {"in": 0.125, "in.bias": 0, "out": 0.25}
        optimizer.step()
        scheduler.step()


def test_taken_since_the_last_reset():
    block, optimizer, watch = watched()
    assert not watch.stepped
    optimizer.zero_grad(set_to_none=False)
    assert not watch.stepped
    optimizer.step()
    assert watch.stepped
    watch.reset()
    assert not watch.stepped
    assert rates(watch, block) == {"in": 0, "in.bias": 0, "out": 0}
    for _ in range(2):  # each later step is seen as the first was
        optimizer.step()
        assert watch.stepped
        watch.reset()


def test_a_watch_that_was_removed_sees_nothing():
    _, optimizer, watch = watched()
    other = StepWatch(optimizer)
    watch.remove()
    optimizer.step()
    assert not watch.stepped
    assert other.stepped


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_not_taken(fused):
    """The scaler does not call an ordinary optimizer; a fused one it calls with `found_inf`."""
    block, optimizer, watch = watched(torch.optim.AdamW, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = block["in"].parameter.detach().clone()
    for broken in (False, True, False):
        scaler.scale(torch.ones(()))  # which sets the scaler up
        for piece in block.slices:
            piece.parameter.grad = torch.ones_like(piece.parameter)
            piece.parameter.grad.flatten()[0] = float("inf") if broken else 1.0
        scaler.step(optimizer)
        scaler.update()
        after = block["in"].parameter.detach().clone()
        assert torch.equal(before, after) is broken
        assert watch.stepped is not broken
        assert rates(watch, block) == {"in": 0.0 if broken else 0.125, "in.bias": 0, "out": 0.0 if broken else 0.25}
        watch.reset()
        before = after


def test_found_inf_of_a_step_that_is_not_skipped():
    """A fused optimizer gets it at every step; in most it is 0."""
    _, optimizer, watch = watched(torch.optim.AdamW, fused=True)
    optimizer.grad_scale = None
    for verdict in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(verdict)
        optimizer.step()
        assert watch.stepped is (verdict == 0.0)


def largest_step(mode: str, beta2: float) -> tuple[float, int]:
    """The largest step of a reborn neuron in multiples of lr, and when: gradient 1 forever, Adam long settled."""
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    lr = 1e-3
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2))
    weight = model[0].weight
    steps = []
    for step in range(200):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = weight.detach()[2, 0].item()
        optimizer.step()
        if step == 0:
            for state in optimizer.state.values():
                state["step"].fill_(1e6)
                state["exp_avg"].fill_(1.0)
                state["exp_avg_sq"].fill_(1.0)
            reset_state(optimizer, find_feed_forwards(model)[0], torch.tensor([2]), mode)
        else:
            steps.append(abs(weight.detach()[2, 0].item() - before) / lr)
    return max(steps), steps.index(max(steps)) + 1


def test_a_zeroed_second_moment_overshoots_and_a_reset_one_does_not():
    overshoot, when = largest_step("zero", beta2=0.999)
    assert overshoot == pytest.approx(6.6, abs=0.05)
    assert 11 <= when <= 13
    assert largest_step("zero", beta2=0.98)[0] == pytest.approx(1.55, abs=0.05)
    for beta2 in (0.999, 0.98):
        assert largest_step("reset", beta2)[0] <= 1 + 1e-6
        assert largest_step("keep", beta2)[0] <= 1 + 1e-6
