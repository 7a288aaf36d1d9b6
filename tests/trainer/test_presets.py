"""Presets: what they set, who wins, and that the recommended one does nothing to a healthy model and says so."""

from dataclasses import fields
from pathlib import Path

import pytest
from support.tiny_runs import assert_same_weights, losses, make_arguments, tiny_bert

from hf_recycle import RecyclingArguments, RecyclingHistory
from hf_recycle.methods.arguments import OwnArguments
from hf_recycle.methods.presets import PRESETS, preset_values
from hf_recycle.runs.recipes import load_recipes


@pytest.mark.parametrize("name", PRESETS)
def test_an_argument_that_is_given_wins_over_the_preset(tmp_path, name):
    values = preset_values(name)
    assert values == load_recipes([f"preset/{name}"]).values
    assert values.keys() <= {item.name for item in fields(OwnArguments)}
    args = RecyclingArguments(str(tmp_path), preset=name, recycle_fraction=0.33)
    assert {key: getattr(args, key) for key in values} == values | {"recycle_fraction": 0.33}


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="preset='best' is not allowed: it must be one of article, recommended"):
        make_arguments(tmp_path, preset="best")


def test_the_recommended_one_leaves_a_healthy_model_alone_and_says_so_once(train, said):
    watched = train("watched", preset="recommended", recycle_probe_batches=2)
    assert [message.partition(":")[0] for message in said() if "left alone" in message] == ["Step 1"]
    plain = train("plain", magnitude_steps=1)
    assert losses(watched) == losses(plain)
    assert_same_weights(watched, plain)
    watched.save_model()
    folder = watched.args.output_dir
    notes = RecyclingHistory.from_pretrained(folder).events["note"]
    assert len(notes) == 2 * 9, "two layers, until 75% of 12 steps"
    assert notes.str.startswith("left alone: 0.0% of the neurons are at or below recycle_threshold=0.025").all()
    said_in_card = f"No neuron was recycled: {notes.iloc[-1].removeprefix('left alone: ')}."
    assert said_in_card in Path(folder, "README.md").read_text()


def test_the_recommended_one_recycles_where_enough_are_dead(train, said):
    model = tiny_bert()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.bias.data[:8] = -10
    trainer = train(model=model, preset="recommended", recycle_probe_batches=2)
    counts = trainer.neuron_table().counts.values()
    assert all((block[:8] == 1).all() and not block[8:].any() for block in counts)
    assert not [message for message in said() if "left alone" in message]
