"""Pruning in whole training runs, against a model whose neurons are masked in the forward pass."""

import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, masked_sentences, tiny_bert
from test_resume import interrupt_and_compare
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_recycle import PruningCallback, RecyclingHistory
from hf_recycle.neurons.table import NeuronTable

PRUNING = {"prune_fraction": 0.5, "prune_start": 2, "prune_end": 10, "prune_steps": 3}


class MaskedForward(TrainerCallback):
    """The explicit form: activations of pruned neurons are multiplied by 0, weights are never touched."""

    def __init__(self, prunings):
        self.masks = {}
        self.prunings = prunings

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, module in model.named_modules():
            if name.endswith(".intermediate"):
                block = name.removesuffix(".intermediate")
                self.masks[block] = torch.ones(module.dense.out_features)
                module.register_forward_hook(lambda _, __, output, block=block: output * self.masks[block])

    def on_step_end(self, args, state, control, **kwargs):
        for row in self.prunings[self.prunings["step"] == state.global_step].itertuples():
            self.masks[row.block][row.pruned] = 0


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_equals_a_model_with_masked_activations(train, arguments, optimizer, tmp_path):
    shared = {"optim": optimizer, "weight_decay": 0.1, "max_grad_norm": 0.5, "masked_head": False}
    data, collator = masked_sentences(), default_data_collator
    pruned = train(data=data, collator=collator, model=tiny_bert(0.0), **PRUNING, **shared, save_strategy="steps")
    history = RecyclingHistory.from_pretrained(tmp_path / "run")
    assert history.prunings["step"].unique().tolist() == [5, 8, 10]
    masked = train(
        "masked",
        data=data,
        collator=collator,
        model=tiny_bert(0.0),
        deterministic_masking=True,
        callbacks=[reference := MaskedForward(history.prunings)],
        **shared,
    )
    assert losses(pruned) == pytest.approx(losses(masked), abs=2e-6)
    for block, off in history.pruned.items():
        assert off.sum() == 16
        assert torch.equal(reference.masks[block] == 0, torch.from_numpy(off))
    zeroed = masked.neuron_table()
    for block in zeroed.blocks:
        block.zero_(torch.from_numpy(history.pruned[block.name]).nonzero().flatten())
    for name, value in pruned.model.state_dict().items():
        torch.testing.assert_close(value, masked.model.state_dict()[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "sgd", "rmsprop", "adafactor", "adagrad"])
def test_pruned_neurons_stay_at_zero(train, optimizer):
    """Whatever the optimizer remembers of them."""
    arguments = {"optim": optimizer, "weight_decay": 0.1, "lr_scheduler_type": "constant", "max_steps": 16}
    if optimizer == "sgd":
        arguments["optim_args"] = "momentum=0.9"
    trainer = train(**PRUNING, **arguments)
    for block, state in zip(trainer.neuron_table().blocks, trainer.neuron_table().states, strict=True):
        weights = block.read(torch.arange(block.num_neurons))
        zero = torch.stack([w.reshape(block.num_neurons, -1).abs().amax(1) == 0 for w in weights.values()])
        assert torch.equal(zero.all(0), state.pruned)
        assert state.pruned.sum() == 16


@pytest.mark.slow
@pytest.mark.parametrize(("at", "selection"), [(1, "random"), (6, "low_magnitude"), (9, "high_magnitude")])
def test_resume_is_exact(at, selection, train):
    everything = {
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_smooth_steps": 4,
        "midpoint_weight": 0.05,
        "magnitude_steps": 5,
    }
    whole, resumed = interrupt_and_compare(train, at, prune_selection=selection, **PRUNING, **everything)
    for first, second in zip(whole.neuron_table().states, resumed.neuron_table().states, strict=True):
        assert torch.equal(first.pruned, second.pruned)
        assert first.pruned.sum() == 16


def test_criteria_choose_what_they_say(train, tmp_path):
    class Magnitudes(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.last = NeuronTable.of(model).magnitudes()

    kept = {}
    for selection in ("low_magnitude", "high_magnitude"):
        spy = Magnitudes()
        once = {"prune_fraction": 0.25, "prune_start": 5, "prune_end": 5}
        train(selection, max_steps=5, callbacks=[spy], save_strategy="steps", prune_selection=selection, **once)
        history = RecyclingHistory.from_pretrained(tmp_path / selection)
        for block, off in history.pruned.items():
            order = spy.last[block].argsort()
            expected = order[:8] if selection == "low_magnitude" else order[-8:]
            assert set(off.nonzero()[0]) == set(expected.tolist())
        kept[selection] = history
    assert kept["low_magnitude"].stats["neurons"]["pruned"] == 16


@pytest.mark.parametrize("others", [{}, {"recycle_steps": 3, "magnitude_steps": 2}])
def test_everything_pruned_from_the_start_leaves_the_bias(train, others):
    trainer = train(prune_fraction=1.0, prune_start=0, prune_end=0, model=tiny_bert(0.0), **others)
    assert all(state.pruned.all() for state in trainer.neuron_table().states)
    hidden = torch.randn(2, 3, 16)
    for layer in trainer.model.bert.encoder.layer:
        out = layer.output.dense(layer.intermediate(hidden))
        torch.testing.assert_close(out, layer.output.dense.bias.expand_as(out), rtol=0, atol=0)
        assert layer.output.dense.bias.abs().max() > 0.01  # it is still trained


class LivingNeurons(TrainerCallback):
    """Sums the midpoint loss of the neurons that are neither pruned nor fading in, before the midpoint step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        table, self.expected = NeuronTable.of(model), 0.0
        for block, neurons in zip(table.blocks, table.states, strict=True):
            living = block.magnitudes()[~neurons.pruned & ~neurons.fading_in()]
            self.expected += float((living - living.mean()).abs().sum())


def test_pruned_neurons_are_not_recycled_and_not_in_the_midpoint_loss(train):
    recycling = {"recycle_steps": 2, "recycle_fraction": 0.2, "recycle_selection": "random", "recycle_smooth_steps": 5}
    spy = LivingNeurons()
    trainer = train(**PRUNING, **recycling, midpoint_weight=0.05, max_steps=20, save_strategy="steps", callbacks=[spy])
    history = RecyclingHistory.from_pretrained(trainer.args.output_dir)
    when = {(row.block, neuron): row.step for row in history.prunings.itertuples() for neuron in row.pruned}
    events = [(row.step, row.block, neuron) for row in history.events.itertuples() for neuron in row.recycled]
    assert len(events) > 40
    assert all(when.get((block, neuron), 100) > step for step, block, neuron in events)
    assert any((block, neuron) in when for _, block, neuron in events)  # some were pruned later, fading in or after
    for state in trainer.neuron_table().states:
        assert state.fade_in is None or not state.pruned[state.fade_in.index].any()
    assert trainer.neuron_methods.scalars()["midpoint_loss"] == pytest.approx(spy.expected, rel=1e-5)


def test_works_on_a_stock_trainer(tmp_path, train):
    """The same neurons, and the same weights, as with a RecyclingTrainer."""
    args = TrainingArguments(
        output_dir=str(tmp_path / "stock"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    callback = PruningCallback(**{name.removeprefix("prune_"): value for name, value in PRUNING.items()})
    data = masked_sentences()
    stock = Trainer(model=tiny_bert(0.0), args=args, train_dataset=data, callbacks=[callback])
    stock.train()
    ours = train(data=data, collator=default_data_collator, model=tiny_bert(0.0), masked_head=False, **PRUNING)
    for first, second in zip(callback.table.states, ours.neuron_table().states, strict=True):
        assert torch.equal(first.pruned, second.pruned)
        assert first.pruned.sum() == 16
    for name, value in stock.model.state_dict().items():
        torch.testing.assert_close(value, ours.model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_fraction": 1.5}, r"prune_fraction=1.5 is not allowed: it must be a number in \[0, 1\]"),
        ({"prune_fraction": 0.5, "prune_steps": 0}, "prune_steps=0 is not allowed"),
        (
            {"prune_fraction": 0.5, "prune_schedule": "square"},
            "prune_schedule='square' is not allowed: .*linear, cubic",
        ),
        ({"prune_fraction": 0.5, "prune_start": 9, "prune_end": 3}, "prune_start=9 is after prune_end=3"),
        ({"prune_fraction": 0.5, "prune_end": 30}, "prune_end=30 is after the last of 12 steps"),
        ({"prune_fraction": 0.5, "prune_start": 13}, "prune_start=13 is after prune_end=12"),
    ],
)
def test_bad_values_are_refused(settings, message, train):
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_a_resumed_run_must_keep_its_pruning(train):
    train(save_strategy="steps", save_steps=6, **PRUNING)
    with pytest.raises(ValueError, match=r"prune_fraction=0.5 \(now 0.9\)"):
        train(resume=True, **PRUNING | {"prune_fraction": 0.9})


def test_equal_runs_are_equal(train):
    assert_same_weights(
        train("a", prune_selection="random", **PRUNING), train("b", prune_selection="random", **PRUNING)
    )
