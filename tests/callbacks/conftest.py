"""A tiny masked language model, its data, and Trainers that train it for a few steps on the CPU."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_recycle import RecyclingArguments, RecyclingTrainer

STEPS = 30


@pytest.fixture
def bert(family_named):
    """The same weights in every test, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family_named("bert").build(d_ff=40)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 67, (64, 8), generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < 0.3
    masked[:, 0] = True
    return [
        {"input_ids": torch.where(m, 4, t), "labels": torch.where(m, t, -100)}
        for t, m in zip(tokens, masked, strict=True)
    ]


@pytest.fixture
def train(tmp_path, dataset):
    """`train(model, callbacks, **arguments)` trains a copy of the model on the stock Trainer, or on a RecyclingTrainer
    if `recycling=True`, and returns the trainer."""
    common = {
        "output_dir": str(tmp_path),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }

    def run(model, callbacks=(), recycling=False, optimizer=None, **arguments):
        trainer_class, arguments_class = Trainer, TrainingArguments
        if recycling:
            trainer_class, arguments_class = RecyclingTrainer, RecyclingArguments
            common.update(masked_head=False, deterministic_masking=False)
        trainer = trainer_class(
            copy.deepcopy(model),
            arguments_class(**{**common, **arguments}),
            train_dataset=dataset,
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=None if optimizer is None else (optimizer, {"lr": 1e-3}),
        )
        trainer.train()
        return trainer

    return run
