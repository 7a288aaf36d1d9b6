"""Dead and dormant neurons in training: counted as a naive loop counts them, logged, kept in the history, shown."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny_runs import masked_sentences, tiny_bert, tiny_modernbert
from torch import nn
from transformers import default_data_collator
from transformers.integrations import TrackioCallback, WandbCallback

from hf_recycle import RecyclingHistory, RecyclingTrainer
from hf_recycle.methods.probe import Probe

DEAD = torch.tensor([1, 4, 7])
GROUPED = ("recycling/dead_share", "recycling/dormant_share")


def relu_bert():
    """Three neurons of the first block can never fire, one hardly does."""
    model = tiny_bert(dropout=0.0)
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    first = model.bert.encoder.layer[0]
    with torch.no_grad():
        first.intermediate.dense.bias[DEAD] = -10.0
        first.intermediate.dense.weight[2] *= 1e-3
    return model


def gated():
    model = tiny_modernbert()
    with torch.no_grad():
        model.model.layers[1].mlp.Wi.weight[24 + 5] = 0.0  # the second half multiplies the first
    return model


class Naive:
    """Counts idle neurons of both blocks position by position whenever a probe looks at them."""

    def __init__(self, monkeypatch):
        self.found, gather = [], Probe.gather

        def watched(probe, blocks, names, step, *more):
            run = probe._run
            everywhere = [[] for _ in run.table.blocks]
            handles = [
                block.out_slice.module.register_forward_pre_hook(
                    lambda module, args, rows=rows: rows.extend(args[0].flatten(0, -2).tolist())
                )
                for block, rows in zip(run.table.blocks, everywhere, strict=True)
            ]
            modes = run.model.training
            run.model.eval()
            with torch.no_grad():
                for _, batch in probe._batches_of(step):
                    run.model(**batch)
            run.model.train(modes)
            for handle in handles:
                handle.remove()
            self.found.append([self.count(everywhere[index]) for index in blocks])
            return gather(probe, blocks, names, step, *more)

        monkeypatch.setattr(Probe, "gather", watched)

    @staticmethod
    def count(rows):
        means = [sum(abs(row[i]) for row in rows) / len(rows) for i in range(len(rows[0]))]
        level = 0.025 * sum(means) / len(means)
        return sum(not any(row[i] for row in rows) for i in range(len(means))), sum(mean <= level for mean in means)


@pytest.mark.parametrize(("build", "dead"), [(relu_bert, [3, 0]), (gated, [0, 1])])
@pytest.mark.parametrize("selection", ["dormant", "flap"])
def test_what_is_logged_is_what_a_naive_loop_says(train, monkeypatch, build, dead, selection):
    naive = Naive(monkeypatch)
    settings = {"recycle_steps": 2, "recycle_selection": selection, "recycle_fraction": 0.1, "max_steps": 6}
    settings["learning_rate"] = 0.0  # so that what is dead stays so
    trainer = train(
        model=build(), data=masked_sentences(), collator=default_data_collator, save_strategy="steps", save_steps=6,
        recycle_probe_batches=2, **settings,
    )  # fmt: skip
    assert [pair[0] for pair in naive.found[0]] == dead
    history = RecyclingHistory.from_pretrained(trainer.args.output_dir)
    table = history.activity
    assert table["step"].tolist() == [2, 2, 4, 4]
    assert table["block"].tolist() == history.blocks * 2
    assert list(zip(table["dead"], table["dormant"], strict=True)) == [pair for both in naive.found for pair in both]
    d_ff = trainer.neuron_table().blocks[0].num_neurons
    assert (table["neurons"] == d_ff).all()
    logged = {
        row["step"]: tuple(row.get(name) for name in GROUPED) for row in trainer.state.log_history if "loss" in row
    }
    card = Path(trainer.args.output_dir, "checkpoint-6", "README.md").read_text()
    assert "| dead | dormant |" in card
    for dead_now, dormant_now in naive.found[-1]:
        assert f" | {dead_now} of {d_ff} | {dormant_now} of {d_ff} | " in card
    shares = [tuple(sum(column) / (2 * d_ff) for column in zip(*both, strict=True)) for both in naive.found]
    assert [logged[step] for step in (1, 2, 3, 4, 5)] == [(None, None), *shares[:1] * 2, *shares[1:] * 2]


def test_pruned_neurons_are_no_dead_ones(train):
    trainer = train(
        model=relu_bert(), data=masked_sentences(), collator=default_data_collator, max_steps=5, recycle_steps=4,
        recycle_selection="dormant", prune_fraction=0.25, prune_start=1, prune_end=1,
    )  # fmt: skip
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "activity"]
    assert [row["metrics"][0] for row in rows] == [{"name": "neurons", "value": 24.0}] * 2


def test_a_resumed_run_logs_what_it_knew(train):
    settings = {"recycle_steps": 3, "recycle_selection": "dormant", "save_strategy": "steps", "save_steps": 4}
    settings |= {"data": masked_sentences(), "collator": default_data_collator, "max_steps": 8}
    whole = train("whole", model=relu_bert(), **settings)
    resumed = train("resumed", model=relu_bert(), resume=f"{whole.args.output_dir}/checkpoint-4", **settings)
    rows = [[[row.get(name) for name in GROUPED] for row in run.state.log_history] for run in (whole, resumed)]
    assert rows[0] == rows[1]
    assert rows[0][4][0] > 0


def test_trackers_get_histograms_under_the_names_of_their_scalars(arguments, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = []
    fake = SimpleNamespace(Histogram=lambda values: ("histogram", len(values)), log=logged.append)
    trackers = []
    for module, cls in (("wandb", WandbCallback), ("trackio", TrackioCallback)):
        monkeypatch.setitem(sys.modules, module, fake)
        tracker = type(cls.__name__, (cls,), dict.fromkeys(("__init__", "setup"), lambda self, *_, **__: None))()
        for event in ("on_train_begin", "on_train_end", "on_log", "on_save"):
            setattr(tracker, event, lambda *_, **__: None)
        trackers.append(tracker)
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(report_to="tensorboard", magnitude_steps=4, max_steps=5),
        train_dataset=masked_sentences(),
        callbacks=trackers,
    )
    trainer.train()
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    name = "train/recycling/magnitudes/bert.encoder.layer.1"
    assert [event.step for event in events.Histograms(name)] == [0, 4, 5]
    magnitudes = trainer.neuron_table().magnitudes()["bert.encoder.layer.1"]
    last = events.Histograms(name)[-1].histogram_value
    assert (last.num, last.min, last.max) == (32, pytest.approx(float(magnitudes.min())), float(magnitudes.max()))
    assert [row["train/global_step"] for row in logged] == [0, 0, 4, 4, 5, 5]
    assert logged[0][name] == ("histogram", 32)
