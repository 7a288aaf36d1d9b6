"""Recycling and pruning by what neurons do, in training: what the event changes, who is spared, and exact resume."""

import math

import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, masked_sentences, tiny_bert, tiny_modernbert
from transformers import default_data_collator

from hf_recycle.methods import pruning
from hf_recycle.methods.recycling import callback
from hf_recycle.methods.registry import REINITIALIZATIONS

DORMANT = {"recycle_selection": "dormant", "recycle_threshold": 0.025, "recycle_probe_batches": 2}
FIXED = {"data": masked_sentences(), "collator": default_data_collator}


def half_dead(dropout=0.0, layers=2, d_ff=32):
    """Neurons 0 to 15 of each layer never fire: GELU of -10 is lost in float32 beside anything else."""
    model = tiny_bert(dropout, layers, d_ff)
    for layer in model.bert.encoder.layer:
        with torch.no_grad():
            layer.intermediate.dense.bias[: d_ff // 2] = -10
    return model


def batch_loss(model):
    rows = masked_sentences(16, seed=9)
    with torch.no_grad():
        return float(model.eval()(**default_data_collator(rows)).loss)


def neurons_of(block):
    return block.read(torch.arange(block.num_neurons))


@pytest.fixture
def at_phases(monkeypatch):
    """Loss on a fixed batch before and after each phase, the neurons of each block after it, and its records."""
    seen, run_phase = [], callback.run_phase

    def watched(table, *args, **kwargs):
        model = table.fresh.model
        training, before = model.training, batch_loss(model)
        records = run_phase(table, *args, **kwargs)
        seen.append((before, batch_loss(model), list(map(neurons_of, table.blocks)), records))
        model.train(training)
        return records

    monkeypatch.setattr(callback, "run_phase", watched)
    return seen


@pytest.mark.parametrize("reinit", ["zero_out", "gradmax", "sample"])
def test_dead_neurons_are_found_and_reborn_without_a_change_of_the_loss(train, at_phases, reinit):
    """All 16 dead ones of each layer and no other, the last layer's too; the loss stays to the bit."""
    settings = {"recycle_steps": 3, "recycle_fraction": 0.5, "recycle_reinit": reinit, "max_steps": 4}
    train(model=half_dead(), **DORMANT, **settings, **FIXED)
    [(before, after, neurons, records)] = at_phases
    assert [record.chosen for record in records] == [list(range(16))] * 2
    assert [record.requested for record in records] == [16, 16]
    assert after == before
    for block in neurons:
        assert block["out"][:16].abs().max() == 0
        assert (block["in"][:16].norm(dim=1) > 0).all()


@pytest.mark.parametrize("build", [lambda: tiny_bert(0.0), tiny_modernbert], ids=["ungated", "gated"])
@pytest.mark.parametrize("reinit", list(REINITIALIZATIONS))
def test_newborns_get_gradients_and_move(train, at_phases, build, reinit):
    """Every one of them, in every part."""
    settings = {"recycle_steps": 3, "recycle_fraction": 0.25, "recycle_reinit": reinit, "recycle_probe_batches": 2}
    trainer = train(model=build(), max_steps=6, weight_decay=0, **settings, **FIXED)
    [(_, _, neurons, records)] = at_phases
    for block, born, record in zip(trainer.neuron_table().blocks, neurons, records, strict=True):
        assert len(record.chosen) == block.num_neurons // 4
        now = neurons_of(block)
        for role, values in born.items():
            changed = (now[role] != values)[record.chosen].reshape(len(record.chosen), -1)
            assert changed.any(1).all(), role


def test_nothing_is_recycled_where_nothing_is_dormant(train):
    trainer = train(model=tiny_bert(0.0), recycle_steps=3, recycle_fraction=0.5, max_steps=6, **DORMANT, **FIXED)
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    assert [(row["recycled"], row["requested"], row["note"]) for row in rows] == [([], 0, "")] * 2


def test_the_fraction_caps_what_the_threshold_finds(train):
    trainer = train(model=half_dead(), recycle_steps=3, recycle_fraction=0.125, max_steps=6, **DORMANT, **FIXED)
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    assert [(len(row["recycled"]), row["requested"], row["eligible"]) for row in rows] == [(4, 4, 16)] * 2


def test_a_threshold_that_takes_a_whole_layer_is_refused_at_that_phase(train):
    settings = {"recycle_selection": "low_magnitude", "recycle_threshold": 1e6}
    trainer = train(model=tiny_bert(0.0), recycle_steps=3, max_steps=6, recycle_fraction=0.5, **settings, **FIXED)
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    note = "the threshold 1e+06 would take every neuron of a layer"
    assert [(row["recycled"], row["note"]) for row in rows] == [([], note)] * 2


def test_maturity_spares_newborns_for_so_many_steps(train):
    """Zero-out newborns are the smallest of all: without maturity low magnitude takes them again and again."""
    common = {"recycle_steps": 2, "recycle_fraction": 0.25, "recycle_reinit": "zero_out", "learning_rate": 1e-5}

    def chosen(**settings):
        trainer = train(model=tiny_bert(0.0, layers=1), max_steps=10, **common, **settings, **FIXED)
        rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
        return [set(row["recycled"]) for row in rows]

    young = chosen()
    assert all(phase == young[0] for phase in young)
    first, second, third, fourth = chosen(recycle_maturity=5)  # phases after steps 2, 4, 6, 8
    assert not first & (second | third)
    assert not second & (third | fourth)
    assert first == fourth, "six steps old"


@pytest.mark.parametrize(
    ("reinit", "gated"), [("split", False), *((name, True) for name in ("split", "zero_out", "gradmax", "sample"))]
)
def test_births_keep_the_loss_beyond_what_was_taken_away(train, at_phases, reinit, gated):
    """The newborns' places held dead or idle neurons, so that nothing was taken away."""
    model = tiny_modernbert() if gated else half_dead()
    if gated:
        for layer in model.model.layers:
            with torch.no_grad():
                layer.mlp.Wo.weight[:, :6] = 0
    settings = {"recycle_steps": 3, "recycle_fraction": 0.25, "recycle_reinit": reinit, "max_steps": 4}
    idle = {"recycle_selection": "low_magnitude", "learning_rate": 0.0} if gated else DORMANT
    train(model=model, **settings, **idle, **FIXED)
    before, after, _, records = at_phases[0]
    assert all(record.chosen for record in records)
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("reinit", list(REINITIALIZATIONS))
def test_births_fade_in(train, at_phases, reinit):
    """Right after the phase the model computes as before; when the fade-in is over, newborns have learned."""
    settings = {"recycle_steps": 3, "recycle_end": 3, "recycle_fraction": 0.25, "recycle_smooth_steps": 4}
    trainer = train(model=tiny_bert(0.0), max_steps=9, recycle_reinit=reinit, **settings, **FIXED)
    before, after, _, records = at_phases[0]
    assert after == before
    assert trainer.neuron_table().fading_in == 0
    for block, record in zip(trainer.neuron_table().blocks, records, strict=True):
        assert (block.read(torch.tensor(record.chosen))["out"].abs().amax(1) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        DORMANT | {"recycle_reinit": "zero_out", "recycle_fraction": 0.1, "recycle_maturity": 3},
        {"recycle_selection": "fisher", "recycle_reinit": "split", "recycle_smooth_steps": 3, "recycle_fraction": 0.1},
        {"recycle_selection": "obs", "recycle_fold": "least_squares", "recycle_fraction": 0.1},
        {"prune_fraction": 0.5, "prune_steps": 2, "prune_selection": "flap", "prune_fold": "mean"},
    ],
    ids=["dormant", "fisher", "obs", "flap"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(train, settings):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5} | settings
    settings |= {"recycle_steps": 2} if "prune_fraction" not in settings else {}
    whole = train("whole", model=half_dead(0.1), **settings)
    resumed = train("resumed", model=half_dead(0.1), resume=f"{whole.args.output_dir}/checkpoint-5", **settings)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)


# ---- Folds ----


@pytest.fixture
def prunings(monkeypatch):
    """Loss on a fixed batch before and after each pruning."""
    seen, prune = [], pruning.prune

    def watched(table, *args, **kwargs):
        model = table.fresh.model
        training, before = model.training, batch_loss(model)
        records = prune(table, *args, **kwargs)
        seen.append((before, batch_loss(model)))
        model.train(training)
        return records

    monkeypatch.setattr(pruning, "prune", watched)
    return seen


@pytest.mark.parametrize("build", [lambda: tiny_bert(0.0), tiny_modernbert], ids=["ungated", "gated"])
@pytest.mark.parametrize("method", ["prune", "recycle"])
def test_least_squares_folds_twins_without_loss(train, prunings, at_phases, build, method):
    """A quarter of the neurons are copies of others: the fold gives the others what they did."""
    model = build()
    trainer = train(model=model, max_steps=1, magnitude_steps=1, **FIXED)
    for block in trainer.neuron_table().blocks:
        quarter = block.num_neurons // 4
        values = block.read(torch.arange(quarter, 2 * quarter))
        block.write(torch.arange(quarter), values | {"out": 0.01 * values["out"].flip(0)})
    del prunings[:], at_phases[:]
    idle = {"learning_rate": 0.0, "max_steps": 2}
    if method == "prune":
        settings = {"prune_fraction": 0.25, "prune_start": 1, "prune_end": 1}
    else:
        settings = {"recycle_steps": 1, "recycle_fraction": 0.25, "recycle_reinit": "zero_out"}
    changes = {}
    for fold in ("none", "least_squares"):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        train(fold, model=model, **settings, **{f"{method}_fold": fold}, **idle, **FIXED)
        before, after, *_ = (prunings or at_phases)[-1]
        changes[fold] = abs(after - before)
        model.load_state_dict(start)
    # Damping leaves a rest.
    assert changes["least_squares"] < 0.1 * changes["none"]


def test_the_mean_fold_of_constant_neurons_keeps_the_loss(train, prunings):
    """Neurons that always give the same are a bias."""
    model = half_dead()
    for layer in model.bert.encoder.layer:
        with torch.no_grad():
            layer.intermediate.dense.weight[:8] = 0
            layer.intermediate.dense.bias[:8] = 0.5
    settings = {"prune_fraction": 0.25, "prune_start": 1, "prune_end": 1, "learning_rate": 0.0, "max_steps": 2}
    trainer = train(model=model, prune_selection="flap", prune_fold="mean", **settings, **FIXED)
    [(before, after)] = prunings
    assert after == pytest.approx(before, rel=1e-6)
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "pruning"]
    assert {row["note"] for row in rows} == {"folded by mean into the bias of the out-projection"}
    assert all(set(row["pruned"]) <= set(range(16)) for row in rows), "constant or dead"


# ---- Refused before training ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recycle_fold": "mean"},
            r"recycle_fold='mean' adds to the bias of the out-projection, and that of model\.lay",
        ),
        ({"prune_fold": "mean", "prune_fraction": 0.1}, r"prune_fold='mean' adds to the bias"),
        (
            {"recycle_fold": "mean", "recycle_smooth_steps": 3},
            "recycle_fold='mean' can't be used with recycle_smooth_st",
        ),
        (
            {"recycle_reinit": "split", "recycle_fraction": 0.6},
            "recycle_reinit='split' can't be used with recycle_fract",
        ),
        ({"recycle_reinit": "split", "recycle_scope": "global"}, "can't be used with recycle_scope='global'"),
        ({"recycle_threshold": math.nan}, "recycle_threshold=nan is not allowed: it must be a number"),
        ({"recycle_probe_batches": 0}, "recycle_probe_batches=0 is not allowed: it must be an integer from 1"),
        ({"recycle_fold": "some"}, "recycle_fold='some' is not allowed: it must be one of none, mean, least_squares"),
    ],
)
def test_what_can_not_work_is_refused_before_training(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(model=tiny_modernbert(), recycle_steps=2, **settings)
