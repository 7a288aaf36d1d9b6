"""The state of a model's neurons: one per model, saved and read back, refused when it does not fit."""

import gc
import weakref

import pytest
import torch

from hf_recycle.methods.recycling.fade_in import blend_weights, restore_new_weights, resume_fade_ins
from hf_recycle.methods.recycling.phase import run_phase
from hf_recycle.methods.schedule import PhaseSchedule
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.table import NeuronTable


def recycled(model, phases=2, smooth_steps=7) -> NeuronTable:
    """A table with counts, and with fade-ins of two ages."""
    table = NeuronTable.of(model)
    settings = RecyclingSettings(steps=1, fraction=0.2, seed=0)
    for step in range(1, phases + 1):
        restore_new_weights(table)
        blend_weights(table, max(smooth_steps, 1), advance=True)
        run_phase(table, settings, PhaseSchedule(1, 1, 99, 99, 0.2), step, smooth_steps=smooth_steps)
    return table


def test_one_table_per_model(plain_net, family):
    model = family.build()
    table = NeuronTable.of(model)
    assert NeuronTable.of(model) is table
    assert NeuronTable.of(plain_net()) is not table
    assert tuple(table.counts) == family.block_names


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_table_goes_with_its_model(family_named, name):
    """Also after fresh weights were drawn, by replay (BERT) and by a fresh instance (ModernBERT)."""
    model = family_named(name).build()
    table = recycled(model)
    watched, weight = weakref.ref(table), weakref.ref(model)
    del table
    gc.collect()
    assert watched() is not None
    del model
    gc.collect()
    assert weight() is None
    assert watched() is None


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="No feed-forward block"):
        NeuronTable.of(torch.nn.Linear(3, 3))


def test_fresh_and_reset(plain_net):
    model = plain_net()
    table = recycled(model)
    weights = model.blocks[0].first.weight.clone()
    assert table.phases == 2
    assert table.fading_in == 16
    table.reset()
    assert table.phases == 0
    assert table.fading_in == 0
    assert all(not counts.any() for counts in table.counts.values())
    assert torch.equal(model.blocks[0].first.weight, weights)


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert"])
def test_round_trip(family_named, name):
    family = family_named(name)
    model, other = family.build(), family.build()
    table = recycled(model)
    saved = table.state_dict()
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in saved.values())
    restored = NeuronTable.of(other)
    restored.load_state_dict(saved)
    assert restored.phases == 2
    for block, mine, theirs in zip(table.blocks, table.states, restored.states, strict=True):
        assert torch.equal(mine.counts, theirs.counts)
        assert torch.equal(mine.last_phase, theirs.last_phase)
        assert torch.equal(mine.last_step, theirs.last_step)
        assert mine.counts.any()
        assert torch.equal(mine.fade_in.index, theirs.fade_in.index)
        assert torch.equal(mine.fade_in.age, theirs.fade_in.age)
        assert mine.fade_in.age.unique().tolist() == [0, 1]
        for fade_in in (theirs.fade_in, theirs.fade_in.shard(block)):
            sides = zip(fade_in.lines(block), mine.fade_in.lines(block), strict=True)
            for values, expected in sides:
                assert values.keys() == expected.keys()
                assert all(torch.equal(values[role], expected[role]) for role in values)
    again = restored.state_dict()
    resume_fade_ins(restored, 7)
    settled = restored.state_dict()
    assert saved.keys() == again.keys() == settled.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    assert all(torch.equal(saved[key], settled[key]) for key in saved)


def test_what_is_saved_is_a_copy(plain_net):
    """And so is what is read."""
    model = plain_net()
    table = recycled(model)
    saved = table.state_dict()
    before = {key: value.clone() for key, value in saved.items()}
    table.states[0].counts += 1
    table.states[0].fade_in.age += 1
    assert all(torch.equal(saved[key], before[key]) for key in saved)
    table.load_state_dict(saved)
    table.states[0].counts += 1
    table.states[0].fade_in.age += 1
    assert all(torch.equal(saved[key], before[key]) for key in saved)


def test_continuing_from_a_saved_state_is_the_same_to_the_bit(plain_net):
    model, other = plain_net(), plain_net()
    table = recycled(model)
    other.load_state_dict(model.state_dict())
    restored = NeuronTable.of(other)
    restored.load_state_dict(table.state_dict())
    resume_fade_ins(restored, 7)
    # The weights of the checkpoint are the effective ones already.
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for step in range(3, 12):
        for each in (table, restored):
            restore_new_weights(each)
            blend_weights(each, 7, advance=True)
            settings = RecyclingSettings(steps=1, fraction=0.2, immunity=2, selection="random", seed=0)
            run_phase(each, settings, PhaseSchedule(1, 1, 99, 99, 0.2), step, smooth_steps=7)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("blocks.0/counts", lambda v: v[:-1]),
        ("blocks.0/counts", None),
        ("blocks.1/last_phase", lambda v: v[None]),
        ("blocks.1/last_step", lambda v: torch.cat([v, v])),
        ("blocks.1/last_step", None),
        ("blocks.0/fade_in/index", lambda v: v.clone().index_fill_(0, torch.tensor([0]), int(v[1]))),
        ("blocks.0/fade_in/index", lambda v: v + 20),
        ("blocks.0/fade_in/index", lambda v: v - 100),
        ("blocks.0/fade_in/index", lambda v: v[:-1]),
        ("blocks.0/fade_in/index", lambda v: v.float()),
        ("blocks.0/fade_in/index", lambda v: v[:0]),
        ("blocks.0/fade_in/age", None),
        ("blocks.0/fade_in/age", lambda v: v[1:]),
        ("blocks.0/fade_in/age", lambda v: v - 5),
        ("blocks.0/fade_in/age", lambda v: v.float()),
        ("blocks.0/fade_in/old/in", None),
        ("blocks.0/fade_in/old/in", lambda v: v[:, 1:]),
        ("blocks.0/fade_in/old/in", lambda v: v.long()),
        ("blocks.0/fade_in/new/in.bias", lambda v: v * float("nan")),
        ("blocks.0/fade_in/new/out", lambda v: v / 0),
        ("blocks.0/fade_in/new/out", lambda v: v[1:]),
    ],
)
def test_what_does_not_fit_is_refused_whole(plain_net, key, change):
    """The message names the entry; the table stays as it was."""
    table = recycled(plain_net())
    saved = table.state_dict()
    fresh = NeuronTable.of(plain_net())
    if change is None:
        del saved[key]
    else:
        saved[key] = change(saved[key])
    entry = key.rsplit("/", 1)[0] if "/index" in key or "/age" in key else key
    with pytest.raises(ValueError, match=entry.replace(".", r"\.")):
        fresh.load_state_dict(saved)
    assert fresh.phases == 0
    assert fresh.fading_in == 0
    assert not any(counts.any() for counts in fresh.counts.values())


def test_lines_in_transition_keep_the_precision_they_were_saved_in(plain_net):
    """DeepSpeed's masters are float32 beside half-precision weights; other engines cut lines to the weights'."""
    saved = recycled(plain_net()).state_dict()
    table = NeuronTable.of(plain_net().bfloat16())
    table.load_state_dict(saved)
    again = table.state_dict()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    resume_fade_ins(table, 7)
    for side in table.states[0].fade_in.lines(table.blocks[0]):
        assert {lines.dtype for lines in side.values()} == {torch.bfloat16}


def test_another_models_state_is_refused(plain_net):
    saved = recycled(plain_net(d_ff=20)).state_dict()
    with pytest.raises(ValueError, match=r"blocks\.0/counts has shape \(20,\), expected \(24,\)"):
        NeuronTable.of(plain_net(d_ff=24)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"blocks\.2/counts is missing"):
        NeuronTable.of(plain_net(d_ff=20, layers=3)).load_state_dict(saved)
