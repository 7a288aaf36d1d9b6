"""Every callback on a plain `nn.Module`: no configuration, no initialiser of its own, the loss from its forward."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_recycle import (
    MagnitudeCallback,
    MidpointLossCallback,
    OvertrainingCallback,
    PruningCallback,
    RecyclingArguments,
    RecyclingCallback,
    RecyclingHistory,
    RecyclingTrainer,
)

PATTERN = "encoder -> decoder"
CALLBACKS = {
    "recycling": lambda: RecyclingCallback(steps=4, fraction=0.1, ff_pattern=PATTERN),
    "fade-in": lambda: RecyclingCallback(
        steps=4, fraction=0.1, smooth_steps=3, reinit="copy_noise", ff_pattern=PATTERN
    ),
    "pruning": lambda: PruningCallback(fraction=0.5, steps=2, ff_pattern=PATTERN),
    "midpoint": lambda: MidpointLossCallback(weight=0.1, ff_pattern=PATTERN),
    "magnitudes": lambda: MagnitudeCallback(steps=4, ff_pattern=PATTERN),
    "overtraining": lambda: OvertrainingCallback(steps=4, batches=2, ff_pattern=PATTERN),
}


class Autoencoder(nn.Module):
    def __init__(self, result):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(6, 20), nn.Linear(20, 6)
        self.result = result

    def forward(self, x):
        y = self.decoder(torch.relu(self.encoder(x)))
        loss = (y - x).square().mean()
        return (loss, y) if self.result == "tuple" else {"loss": loss, "y": y}


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"x": row} for row in torch.randn(64, 6, generator=generator)]


def arguments(folder, cls=TrainingArguments, **more):
    common = {"max_steps": 9, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return cls(str(folder), learning_rate=1e-2, **common | more)


@pytest.mark.parametrize("result", ["tuple", "dict"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_on_a_stock_trainer(name, result, tmp_path):
    callback = CALLBACKS[name]()
    trainer = Trainer(Autoencoder(result), arguments(tmp_path), train_dataset=samples(), callbacks=[callback])
    trainer.train()
    [block] = callback.table.blocks
    assert block.num_neurons == 20
    done = {
        "recycling": lambda: int(callback.table.counts[block.name].sum()) == 4,
        "fade-in": lambda: int(callback.table.counts[block.name].sum()) == 4,
        "pruning": lambda: int((trainer.model.decoder.weight == 0).all(0).sum()) == 10,
        "midpoint": lambda: callback.scalars()["midpoint_loss"] > 0,
        "magnitudes": lambda: len(callback.recorder.to_table()) > 0,
        "overtraining": lambda: callback.table.overtrain_samples == 2 * 2 * 8,
    }
    assert done[name]()


def test_only_the_chosen_lines_change(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                seen.append({key: value.clone() for key, value in model.state_dict().items()})

    recycling = CALLBACKS["recycling"]()
    Trainer(
        Autoencoder("dict"), arguments(tmp_path), train_dataset=samples(), callbacks=[Look(), recycling, Look()]
    ).train()
    before, after = seen
    changed = (before["encoder.weight"] != after["encoder.weight"]).any(1)
    assert changed.nonzero().flatten().tolist() == recycling.recorder.to_table().to_pylist()[0]["recycled"]
    assert int(changed.sum()) == 2
    assert torch.equal((before["decoder.weight"] != after["decoder.weight"]).any(0), changed)
    assert torch.equal(before["encoder.bias"] != after["encoder.bias"], changed)
    assert torch.equal(before["decoder.bias"], after["decoder.bias"])


def test_a_recycling_trainer_saves_and_resumes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_recycle.plots.run.figure_images", lambda *_, **__: {})  # which take most of the time

    def run(folder, **more):
        settings = {"recycle_steps": 4, "recycle_fraction": 0.1, "recycle_smooth_steps": 3, "ff_pattern": PATTERN}
        args = arguments(
            tmp_path / folder, RecyclingArguments, **settings, **{"save_strategy": "steps", "save_steps": 5}
        )
        trainer = RecyclingTrainer(Autoencoder("dict"), args, train_dataset=samples())
        trainer.train(**more)
        return trainer

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    history = RecyclingHistory.from_pretrained(tmp_path / "resumed" / "checkpoint-9")
    assert sum(int(counts.sum()) for counts in history.counts.values()) == 4
