"""`RecyclingCallback` on a stock Trainer."""

import copy
import logging
from typing import ClassVar

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback

from hf_recycle import RecyclingCallback
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records.recorder import rows_of_kind


def events(callback):
    return rows_of_kind(callback.recorder.to_table(), "phase").to_pylist()


class Spy(TrainerCallback):
    """After which steps which neurons of block 0 jumped: put before and after another callback, it sees its doing."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def spied(callback):
    before, after = Spy(), Spy()

    def changed(step: int) -> set[str]:
        return {n for n, p in before.weights[step].items() if not torch.equal(p, after.weights[step][n])}

    return [before, callback, after], changed, before, after


def test_recycles_right_after_the_steps_it_should(bert, train):
    callback = RecyclingCallback(steps=7, start=5, end=26, fraction=0.1)
    callbacks, changed, before, after = spied(callback)
    train(bert, callbacks)
    assert {step for step in before.weights if changed(step)} == {5, 12, 19, 26}
    assert sorted({row["step"] for row in events(callback)}) == [5, 12, 19, 26]
    row = events(callback)[0]
    assert row["block"] == "bert.encoder.layer.0"
    assert (row["phase"], row["requested"], row["eligible"], len(row["recycled"])) == (1, 4, 40, 4)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    rows = (before.weights[5][name] != after.weights[5][name]).any(dim=1).nonzero().flatten().tolist()
    assert rows == row["recycled"]
    touched = {
        f"bert.encoder.layer.{i}.{part}"
        for i in range(2)
        for part in ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")
    }
    assert changed(12) <= touched
    assert {name for name in touched if "weight" in name} <= changed(12)


def test_not_after_the_last_step_and_not_before_the_first(bert, train):
    callback = RecyclingCallback(steps=10)
    train(bert, [callback])
    assert sorted({row["step"] for row in events(callback)}) == [10, 20]


def test_fractions_of_the_training(bert, train):
    callback = RecyclingCallback(steps=0.1, start=0.2, end=0.5, smooth_steps=0.1)
    train(bert, [callback])
    assert sorted({row["step"] for row in events(callback)}) == [6, 9, 12, 15]
    assert callback.settings.smooth_steps == 3


def test_off_it_changes_nothing(bert, train):
    callback = RecyclingCallback(steps=0)
    reference = train(bert).model
    assert all(
        torch.equal(a, b)
        for a, b in zip(train(bert, [callback]).model.parameters(), reference.parameters(), strict=True)
    )
    assert events(callback) == []
    assert callback.scalars() == {}


def test_training_before_the_first_phase_is_that_of_the_baseline(bert, train):
    """Neither data order nor dropout draw from what the method draws: weights agree to the bit until the phase."""
    bert = copy.deepcopy(bert)
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    baseline, recycled = Spy(), Spy()
    train(bert, [baseline])
    train(bert, [recycled, RecyclingCallback(steps=10, fraction=1e-9, selection="random")])
    # A phase that takes nobody: the same to the end.
    for step in range(1, 31):
        assert all(torch.equal(p, baseline.weights[step][n]) for n, p in recycled.weights[step].items())


def test_the_seed_of_the_training_is_the_default(bert, train):
    def chosen(**arguments):
        callback = RecyclingCallback(steps=10, selection="random", fraction=0.2, **arguments)
        train(bert, [callback], seed=5)
        return [row["recycled"] for row in events(callback)]

    assert chosen() == chosen(seed=5)
    assert chosen() != chosen(seed=6)


def test_scalars(bert, train):
    callback = RecyclingCallback(steps=10, fraction=0.1, immunity=1, smooth_steps=15)
    train(bert, [callback])
    # Phases at 10 and 20, 4 of 40 in each of two blocks; those of 20 are still on their way.
    assert callback.scalars() == {
        "neurons_recycled": 16,
        "neurons_ever_recycled_share": 16 / 80,
        "neurons_fading_in": 8,
        "neurons_immune": 8,
        "optimizer_entries_reset": 16 * 2 * (16 + 1 + 16),  # two moments of the weights in, the bias and those out
    }


@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_smooth_without_clipping_equals_the_recycling_trainer(bert, train, optimizer_state):
    settings = {"steps": 8, "fraction": 0.1, "smooth_steps": 12, "optimizer_state": optimizer_state}
    stock = train(bert, [RecyclingCallback(**settings)], max_grad_norm=0.0)
    ours = train(
        bert, recycling=True, max_grad_norm=0.0, **{f"recycle_{name}": value for name, value in settings.items()}
    )
    table, expected = (NeuronTable.of(trainer.model) for trainer in (stock, ours))
    assert all(torch.equal(a, b) for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True))
    assert table.fading_in == expected.fading_in > 0
    assert all(torch.equal(table.counts[name], counts) for name, counts in expected.counts.items())


def test_smooth_with_clipping_deviates_as_the_docstring_says(bert, train):
    """Scaled after the norm was taken on a stock Trainer; before on ours. (Else the test above shows nothing.)"""
    settings = {"steps": 8, "fraction": 0.3, "smooth_steps": 12}
    stock = train(bert, [RecyclingCallback(**settings)], max_grad_norm=0.05)
    ours = train(bert, recycling=True, max_grad_norm=0.05, **{f"recycle_{n}": v for n, v in settings.items()})
    assert not all(torch.equal(a, b) for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True))
    assert "after gradients were clipped" in " ".join(RecyclingCallback.__doc__.split())


def test_right_after_a_smooth_phase_the_weights_are_the_old_ones(bert, train):
    callbacks, changed, before, _ = spied(RecyclingCallback(steps=10, fraction=0.2, smooth_steps=5))
    train(bert, callbacks)
    assert not any(changed(step) for step in before.weights)


def test_gradient_accumulation_does_not_advance_the_transition(bert, train):
    """Micro-batches are no optimizer steps: 4 of them per step, and α is over after 5 steps all the same."""

    class Ages(TrainerCallback):
        def __init__(self):
            self.seen = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            fade_in = NeuronTable.of(model).states[0].fade_in
            self.seen[state.global_step] = None if fade_in is None else fade_in.age.tolist()

    ages = Ages()
    callback = RecyclingCallback(steps=10, end=10, fraction=0.05, smooth_steps=5)
    train(bert, [callback, ages], gradient_accumulation_steps=4, per_device_train_batch_size=2)
    assert {step: age for step, age in ages.seen.items() if age is not None} == {10 + j: [j, j] for j in range(5)}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_skipped_steps_do_not_advance_the_transition(bert, train, monkeypatch, optim):
    """fp16 overflow at steps 12 and 13, as the gradient scaler does it: it does not call the optimizer, or, if that is
    fused, tells it to do nothing. A fade-in of 5 steps takes 7."""
    stock_step = AcceleratedOptimizer.step
    weights = {}

    def step(optimizer, closure=None):
        overflow = getattr(optimizer, "overflow", False)
        if optim == "adamw_torch":
            return None if overflow else stock_step(optimizer, closure)
        optimizer.optimizer.grad_scale, optimizer.optimizer.found_inf = None, torch.tensor(float(overflow))
        stock_step(optimizer, closure)
        del optimizer.optimizer.grad_scale, optimizer.optimizer.found_inf

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer.overflow = state.global_step + 1 in (12, 13)

    class InTransition(TrainerCallback):
        steps: ClassVar[list[int]] = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if NeuronTable.of(model).fading_in:
                self.steps.append(state.global_step)
            weights[state.global_step] = [p.detach().clone() for p in model.parameters()]

    callbacks = [Overflow(), RecyclingCallback(steps=10, end=10, smooth_steps=5, fraction=0.1), InTransition()]
    train(bert, callbacks, optim=optim)
    assert InTransition.steps == list(range(10, 17))
    for earlier, later, same in ((11, 12, True), (12, 13, True), (13, 14, False)):
        pairs = zip(weights[earlier], weights[later], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same


def test_a_second_training_of_the_same_model_starts_afresh(bert, train):
    first, second = (RecyclingCallback(steps=10) for _ in range(2))
    trainer = train(bert, [first])
    counts = {name: values.clone() for name, values in first.table.counts.items()}
    trainer.callback_handler.callbacks = [
        second if callback is first else callback for callback in trainer.callback_handler.callbacks
    ]
    trainer.train()
    assert second.table.phases == 2
    assert {n: int(c.sum()) for n, c in second.table.counts.items()} == {n: int(c.sum()) for n, c in counts.items()}


# ---- What is refused, and what is said ----


def test_an_unknown_setting():
    with pytest.raises(TypeError, match=r"RecyclingCallback has no setting 'stpes'; did you mean steps\?"):
        RecyclingCallback(stpes=100)
    with pytest.raises(TypeError, match=r"no setting 'recycle_steps'; did you mean steps\?"):
        RecyclingCallback(recycle_steps=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0}, r"fraction=0 is not allowed: it must be a number in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction=1\.5 is not allowed: it must be a number in \(0, 1\]"),
        ({"fraction": float("nan")}, "fraction=nan is not allowed"),
        ({"fraction": "0.1"}, "fraction='0.1' is not allowed"),
        ({"steps": 1.5}, "steps=1.5 is not allowed: it must be an integer number of steps, or a fraction below 1"),
        ({"steps": -1}, "steps=-1 is not allowed"),
        ({"start": 2.5}, "start=2.5 is not allowed"),
        ({"smooth_steps": 10.5}, "smooth_steps=10.5 is not allowed"),
        ({"start": 20, "end": 10}, "start=20 is after end=10"),
        ({"start": 0.5, "end": 0.25}, "start=0.5 is after end=0.25"),
        ({"selection": "lowest"}, "selection='lowest' is not allowed: it must be one of low_magnitude, high_magnitude"),
        ({"reinit": "zeros"}, "reinit='zeros' is not allowed: it must be one of initial, matched_normal, copy_noise"),
        ({"scope": "model"}, "scope='model' is not allowed: it must be one of layer, global"),
        ({"fraction_schedule": "step"}, "fraction_schedule='step' is not allowed: it must be one of constant, linear"),
        ({"optimizer_state": "none"}, "optimizer_state='none' is not allowed: it must be one of reset, zero, keep"),
        ({"immunity": -1}, "immunity=-1 is not allowed: it must be an integer >= 0"),
        ({"immunity": 1.0}, "immunity=1.0 is not allowed"),
        ({"noise_scale": -0.1}, "noise_scale=-0.1 is not allowed: it must be a number >= 0"),
        ({"layers": []}, r"layers=\[\] is not allowed: it must be a list of block indices"),
        ({"layers": [-1]}, r"layers=\[-1\] is not allowed"),
        ({"layers": [0.5]}, r"layers=\[0\.5\] is not allowed"),
        ({"seed": -3}, "seed=-3 is not allowed"),
    ],
)
def test_a_value_that_is_not_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        RecyclingCallback(**settings)


def test_start_after_end_that_shows_only_with_the_length_of_training(bert, train):
    with pytest.raises(ValueError, match="recycle_start=15 is after recycle_end=10"):
        train(bert, [RecyclingCallback(steps=1, start=0.5, end=10)])


def test_a_layer_that_does_not_exist(bert, train):
    with pytest.raises(ValueError, match=r"recycle_layers=\[0, 2\] names block 2: there are 2 blocks"):
        train(bert, [RecyclingCallback(steps=10, layers=[0, 2])])


def test_a_model_without_blocks(train):
    with pytest.raises(ValueError, match="No feed-forward block was found in Linear"):
        train(torch.nn.Linear(3, 3), [RecyclingCallback(steps=10)])


def test_an_optimizer_that_cannot_be_reset_is_refused_before_the_first_step(bert, train):
    spy = Spy()
    with pytest.raises(ValueError, match="recycle_optimizer_state='reset' or 'zero' can't be used with Rprop"):
        train(bert, [RecyclingCallback(steps=10), spy], optimizer=torch.optim.Rprop)
    assert not spy.weights
    callback = RecyclingCallback(steps=10, optimizer_state="keep")
    train(bert, [callback], optimizer=torch.optim.Rprop)
    assert len(events(callback)) == 4


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optimizers_of_the_trainer(bert, train, optim):
    callback = RecyclingCallback(steps=10, smooth_steps=3)
    model = train(bert, [callback], optim=optim, learning_rate=1e-3).model
    assert len(events(callback)) == 4
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 5, "fraction": 0.3, "immunity": 3}, "recycle_immunity=3 with recycle_fraction=0.3 leaves fewer"),
        ({"steps": 5, "smooth_steps": 6}, "recycle_smooth_steps=6 is longer than the 5 steps between phases"),
        ({"steps": 100}, "no phase falls into the 30 steps of this training"),
    ],
)
def test_what_is_odd_is_said_at_the_start(bert, train, caplog, settings, expected):
    with caplog.at_level(logging.WARNING):
        train(bert, [RecyclingCallback(**settings)])
    said = [record.getMessage() for record in caplog.records if expected in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 5, "fraction": 0.25, "immunity": 3},  # four quarters: just enough
        {"steps": 10, "fraction": 0.5, "immunity": 9},  # two phases in all
        {"steps": 5, "smooth_steps": 5},
    ],
)
def test_what_is_not_odd_is_not_said(bert, train, caplog, settings):
    with caplog.at_level(logging.WARNING):
        train(bert, [RecyclingCallback(**settings)])
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("hf_recycle")]


def test_a_shortfall_is_said_and_recorded_at_the_phase(bert, train, caplog):
    callback = RecyclingCallback(steps=10, fraction=0.75, immunity=1)
    with caplog.at_level(logging.WARNING):
        train(bert, [callback])
    assert any("Step 20: too few eligible neurons." in record.getMessage() for record in caplog.records)
    rows = [row for row in events(callback) if row["step"] == 20]
    assert [(row["requested"], row["eligible"], len(row["recycled"])) for row in rows] == [(30, 10, 10)] * 2


def test_a_phase_with_broken_weights_is_skipped_and_recorded(bert, train):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 10:
                with torch.no_grad():
                    model.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = float("nan")

    callback = RecyclingCallback(steps=10)
    train(bert, [Poison(), callback])
    rows = events(callback)
    assert [row["recycled"] for row in rows] == [[]] * 4
    assert {row["note"] for row in rows} == {"skipped: some magnitudes are not finite"}
