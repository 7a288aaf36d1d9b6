"""A saved optimizer or scheduler state that is not this run's is refused before anything sees it."""

import copy
import re

import pytest
import torch
import transformers
from support.tiny_runs import tiny_bert
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from hf_recycle.engines.optimizer_checks import check_optimizer_state, check_scheduler_state, check_when_loaded
from hf_recycle.errors import UserError

OPTIMIZERS = {
    "fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "plain SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,  # looks at numbers in its first step
    "Adafactor": torch.optim.Adafactor,
    "transformers' Adafactor": lambda groups: transformers.Adafactor(groups, lr=0.1, relative_step=False),
}


class Derived(torch.optim.AdamW):
    """May keep more than its base."""


class Unknown(torch.optim.Optimizer):
    """Of another library."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight] |= {"exp_avg": weight.grad.clone(), "scales": torch.ones(1, 3), "step": 1}


def stepped(name: str, steps: int = 2) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6).t()), nn.Parameter(torch.randn(5))]
    make = OPTIMIZERS.get(name) or {"Derived": lambda groups: Derived(groups, fused=True), "Unknown": Unknown}[name]
    optimizer = make([{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}])
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return optimizer


def refused(optimizer, saved, message: str) -> None:
    names = {id(optimizer.param_groups[0]["params"][0]): "encoder.weight"}
    with pytest.raises(UserError, match=message) as error:
        check_optimizer_state(optimizer, saved, names, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Derived", "Unknown"])
def test_the_states_of_an_optimizer_fit_it(name):
    saved = copy.deepcopy(stepped(name).state_dict())
    fresh = stepped(name, steps=0)
    check_optimizer_state(fresh, saved, {}, "here")
    fresh.load_state_dict(saved)
    check_optimizer_state(fresh, fresh.state_dict(), {}, "here")


DAMAGES = {
    "fewer": lambda value: torch.zeros(3),
    "none": lambda value: torch.zeros(0),
    "more": lambda value: torch.zeros(7, 4),
    "one after the other": lambda value: value.reshape(-1).clone(),
    "all the same": lambda value: torch.zeros(1).expand(value.shape),
    "a view of less": lambda value: torch.zeros(7).as_strided(value.shape, (1, 0)),
    "other strides": lambda value: value.t().contiguous().t(),
    "whole numbers": lambda value: value.to(torch.int64),
    "complex": lambda value: value.to(torch.complex64),
    "a number": lambda value: 7,
    "a text": lambda value: "7",
    "nothing": lambda value: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_its_parameter(damage):
    fresh = stepped("fused", steps=0)
    for key in ("exp_avg", "exp_avg_sq"):
        saved = copy.deepcopy(stepped("fused").state_dict())
        saved["state"][0][key] = DAMAGES[damage](saved["state"][0][key])
        refused(fresh, saved, rf"here does not fit encoder\.weight, of shape \(6, 4\): its {key} is ")


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_derived_optimizer_what_its_base_keeps_is_known(damage):
    saved = copy.deepcopy(stepped("Derived").state_dict())
    saved["state"][0]["more"] = torch.ones(2)
    check_optimizer_state(stepped("Derived", steps=0), saved, {}, "here")
    saved["state"][0]["exp_avg"] = DAMAGES[damage](saved["state"][0]["exp_avg"])
    refused(stepped("Derived", steps=0), saved, r"its exp_avg is .* where .*\(6, 4\).* is expected")


@pytest.mark.parametrize("damage", ["all the same", "a view of less", "other strides"])
def test_of_an_unknown_optimizer_nothing_may_be_larger_than_what_is_stored(damage):
    saved = copy.deepcopy(stepped("Unknown").state_dict())
    saved["state"][0]["exp_avg"] = DAMAGES[damage](saved["state"][0]["exp_avg"])
    refused(stepped("Unknown", steps=0), saved, r"its exp_avg is .* where .*\(6, 4\).* is expected")


def test_a_tensor_of_other_strides_would_be_wrong_without_a_word():
    """Why strides count: the fused step goes through memory, and not from entry to entry."""
    one, other = stepped("fused"), stepped("fused")
    saved = copy.deepcopy(other.state_dict())
    for entries in saved["state"].values():
        entries |= {key: DAMAGES["other strides"](value) for key, value in entries.items() if value.dim() == 2}
    other.load_state_dict(saved)
    for optimizer in (one, other):
        optimizer.step()
    weights = [optimizer.param_groups[0]["params"][0] for optimizer in (one, other)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"][0].pop("exp_avg_sq"), "it holds step, exp_avg where step, exp_avg, exp_avg_sq"),
        (lambda saved: saved["state"][0].update(more=1), "it holds step, exp_avg, exp_avg_sq, more where"),
        (lambda saved: saved["state"].update({0: [1]}), "it is a list"),
        (lambda saved: saved["state"].update({9: {}}), "parameters that the model does not have"),
        (lambda saved: saved["state"][0].update(step=torch.zeros(3)), "its step is"),
        (lambda saved: saved["state"][0].update(step=float("nan")), "its step is nan"),
        (lambda saved: saved["state"][0].update(step=torch.tensor(-1.0)), r"its step is torch\.float32 -1\.0"),
        (lambda saved: saved["param_groups"].pop(), r"its groups have \[2\] parameters and those of this run \[2, 1\]"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), r"its groups have \[1, 1\] parameters"),
        (lambda saved: saved["param_groups"][0].update(lr=float("nan")), "lr is nan, and 0.001 in this run"),
        (lambda saved: saved["param_groups"][0].update(lr="0.1"), "lr is '0.1'"),
        (lambda saved: saved["param_groups"][0].update(betas=(0.9,)), r"betas is \(0\.9,\)"),
        (lambda saved: saved["param_groups"][0].update(maximize=True), "maximize is True, and False in this run"),
        (lambda saved: saved["param_groups"][0].pop("eps"), "eps is missing"),
        (lambda saved: saved.pop("state"), "is no state of an optimizer"),
    ],
)
def test_a_state_of_another_optimizer(change, message):
    saved = copy.deepcopy(stepped("fused").state_dict())
    change(saved)
    refused(stepped("fused", steps=0), saved, message)


def test_a_state_in_another_precision_is_cast_as_ever():
    saved = copy.deepcopy(stepped("fused").state_dict())
    for entries in saved["state"].values():
        entries |= {key: value.bfloat16() for key, value in entries.items() if key != "step"}
        entries["step"] = int(entries["step"])
    del saved["param_groups"][0]["decoupled_weight_decay"]  # as a version before it had written it
    check_optimizer_state(stepped("fused", steps=0), saved, {}, "here")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_check_is_made_by_the_load_itself(tmp_path, wrapped):
    model = nn.Linear(4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    loaded = transformers.Trainer(tiny_bert()).accelerator.prepare(optimizer) if wrapped else optimizer
    before = copy.deepcopy(optimizer.state_dict())
    check_when_loaded(loaded, LambdaLR(optimizer, lambda step: 1.0), model, str(tmp_path))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} does not fit weight"):
        loaded.load_state_dict(saved)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    loaded.load_state_dict(before)


def schedulers():
    optimizer = stepped("fused", steps=0)
    return LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5]), ReduceLROnPlateau(optimizer)


def test_the_states_of_a_scheduler_fit_it():
    for own, other in zip(schedulers(), schedulers(), strict=True):
        check_scheduler_state(own, other.state_dict(), "here")
    linear = transformers.get_linear_schedule_with_warmup(stepped("fused", steps=0), 2, 9)
    constant = transformers.get_constant_schedule(stepped("fused", steps=0))
    check_scheduler_state(linear, constant.state_dict(), "here")
    check_scheduler_state(constant, linear.state_dict() | {"verbose": False}, "here")  # as PyTorch once wrote


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": 1},
        {"step": None},
        {"get_lr": "x"},
        {"more": [1, 2]},
        {"last_epoch": -3},
        {"last_epoch": "x"},
        {"base_lrs": [1.0]},
        {"base_lrs": [float("nan"), 1.0]},
        {"_last_lr": [float("inf"), 1.0]},
        {"lr_lambdas": [{"func": 1}, {}]},
    ],
)
def test_a_state_that_a_scheduler_must_not_take(change):
    (scheduler, _), (key, _) = schedulers(), next(iter(change.items()))
    with pytest.raises(UserError, match=f"here does not fit the scheduler of this run: {key} is"):
        check_scheduler_state(scheduler, scheduler.state_dict() | change, "here")


def test_what_is_no_state_of_a_scheduler():
    for saved in ([1], {1: 2}, None):
        with pytest.raises(UserError, match="holds no state of a scheduler"):
            check_scheduler_state(schedulers()[0], saved, "here")
