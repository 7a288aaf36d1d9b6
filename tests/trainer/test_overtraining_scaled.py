"""Overtraining with a gradient scaler: by hand, and in real runs with real overflows."""

from types import SimpleNamespace

import pytest
import torch
from support.overflow import POISONED, poison, use_scaler
from support.tiny_runs import assert_same_weights, masked_sentences, tiny_bert
from transformers import default_data_collator

from hf_recycle import RecyclingTrainer
from hf_recycle.methods.overtraining.training import overtrain
from hf_recycle.methods.settings import OvertrainingSettings
from hf_recycle.neurons.table import NeuronTable

OVERTRAINING = {"overtrain_steps": 4, "overtrain_batches": 3}


def scaled(optimizer, scale: float):
    """The optimizer as Accelerate wraps it with a gradient scaler."""
    scaler = SimpleNamespace(get_scale=lambda: scale, is_enabled=lambda: True)
    return SimpleNamespace(optimizer=optimizer, scaler=scaler)


def by_hand(scale: float, overflow_at: int = -1, batches: int = 3):
    model = tiny_bert(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = [{k: torch.tensor([v]) for k, v in sample.items()} for sample in masked_sentences(batches)]

    def loss_of(model, batch):
        loss = model(**batch).loss
        return loss * float("inf") if batch is data[overflow_at] and overflow_at >= 0 else loss

    record = overtrain(
        NeuronTable.of(model),
        OvertrainingSettings(steps=1, batches=batches, subset="smallest", fraction=0.5, seed=0),
        1,
        model=model,
        optimizer=scaled(optimizer, scale),
        batches=iter(data),
        loss_of=loss_of,
        max_grad_norm=0.5,
        device=torch.device("cpu"),
        process=0,
    )
    return model, record


def test_a_loss_scale_changes_nothing():
    plain, _ = by_hand(1.0)
    model, record = by_hand(1024.0)
    assert record.skipped == 0
    for first, second in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_a_batch_that_overflows_is_skipped():
    model, record = by_hand(1024.0, overflow_at=0, batches=1)
    assert record.skipped == 1
    for first, second in zip(model.parameters(), tiny_bert(0.0).parameters(), strict=True):
        assert torch.equal(first, second)
    model, record = by_hand(1024.0, overflow_at=1)
    assert record.skipped == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.fixture
def scaled_run(arguments):
    """`scaled_run(folder, scaler, poisoned, **settings)`: fp16 with a real gradient scaler, but without autocast."""

    def run(folder, scaler=True, poisoned=False, **settings):
        trainer = RecyclingTrainer(
            model=tiny_bert(0.0),
            args=arguments(folder, fp16=scaler, lr_scheduler_type="constant", optim="adamw_torch", **settings),
            train_dataset=masked_sentences(),
            data_collator=default_data_collator,
        )
        if scaler:
            use_scaler(trainer, autocast=False)
        if poisoned:
            poison(trainer)
        trainer.train()
        return trainer

    return run


def test_with_a_real_gradient_scaler(scaled_run):
    """The scale, a power of two, changes nothing, and overtraining changes nothing of the main run's scaler."""
    plain, fp16 = scaled_run("plain", scaler=False, **OVERTRAINING), scaled_run("fp16", **OVERTRAINING)
    assert_same_weights(plain, fp16)
    without = scaled_run("without")
    assert fp16.accelerator.scaler.state_dict() == without.accelerator.scaler.state_dict()


def test_skipped_steps_do_not_count(scaled_run):
    trainer = scaled_run("run", poisoned=True, overtrain_steps=2, overtrain_batches=1)
    assert POISONED == (3, 6, 7)
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "overtraining"]
    assert [row["step"] for row in rows] == [2, 5, 9, 11]  # optimizer steps 2, 4, 6 and 8
