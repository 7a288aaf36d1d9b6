"""A run that would go on as another one is refused, and what was changed on purpose is said, with both values."""

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, masked_sentences, sentences, tiny_bert
from transformers import DataCollatorForLanguageModeling, Trainer
from transformers.utils import logging

from hf_recycle import RecyclingTrainer
from hf_recycle.checkpoints.file_list import LIST_FILE
from hf_recycle.errors import UserError

RECYCLING = {"recycle_steps": 3, "recycle_fraction": 0.1}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def corpus(n: int = 48, seed: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(sentences(n, seed=seed))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A checkpoint at step 2 of 4, to be copied before it is changed."""
    from hf_recycle import RecyclingArguments

    folder = tmp_path_factory.mktemp("first")
    args = RecyclingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        disable_tqdm=True, **RECYCLING, **SAVING,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer)
    RecyclingTrainer(model=tiny_bert(), args=args, train_dataset=corpus(), data_collator=collator).train()
    return folder / "checkpoint-2"


@pytest.fixture
def said(caplog):
    logging.enable_propagation()
    yield lambda: [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    logging.disable_propagation()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim": "sgd"}, r"optimizer='AdamW' \(now 'SGD'\)"),
        ({"seed": 7}, r"seed=42 \(now 7\)"),
        ({"data_seed": 7}, r"data_seed=None \(now 7\)"),
        ({"data": corpus(40)}, r"examples=48 \(now 40\)"),
        ({"data": corpus().to_iterable_dataset()}, r"examples=48 \(now None\)"),
        ({"data": corpus(seed=1)}, r"checksum of the first examples='\w+' \(now '\w+'\)"),
        ({"per_device_train_batch_size": 8}, r"batch_size=4 \(now 8\)"),
        ({"gradient_accumulation_steps": 3}, r"batch_size=4 \(now 12\)"),
        ({"dataloader_drop_last": True}, r"dataloader_drop_last=False \(now True\)"),
        ({"train_sampling_strategy": "sequential"}, r"sampling='random' \(now 'sequential'\)"),
    ],
)
def test_another_run_is_refused(change, said, checkpoint, train):
    with pytest.raises(UserError, match=rf"checkpoint-2 was made with .*{said}"):
        train("next", resume=str(checkpoint), **({"data": corpus(), "max_steps": 4} | RECYCLING | change))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 5e-3}, "learning_rate=0.01 (now 0.005): training goes on with the checkpoint's"),
        ({"weight_decay": 0.1}, "weight_decay=0.0 (now 0.1): training goes on with the checkpoint's"),
        ({"adam_beta2": 0.9}, "adam_beta2=0.999 (now 0.9): training goes on with the checkpoint's"),
        (
            {"model": tiny_bert().bfloat16()},
            "precision='float32' (now 'bfloat16'): training goes on with the one of now",
        ),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type='linear' (now 'constant'): training goes on with the o"),
        ({"mask_rate": 0.4}, "mask_rate=0.15 (now 0.4): training goes on with the one of now"),
        ({"seed": 7, "ignore_data_skip": True}, "seed=42 (now 7): its epoch's data begin anew"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, None),
        ({}, None),
    ],
)
def test_a_change_that_may_be_meant_is_said(change, expected, checkpoint, train, tokenizer, said):
    change = {"data": corpus(), "max_steps": 4} | RECYCLING | change
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=change.pop("mask_rate", 0.15))
    if "seed" in change:
        change["recycle_seed"] = 42
    trainer = train("next", resume=str(checkpoint), collator=collator, **change)
    assert trainer.state.global_step == 4
    messages = [message for message in said() if "made with" in message]
    assert len(messages) == (expected is not None)
    assert all(expected in message for message in messages)


@pytest.mark.slow
def test_a_learning_rate_that_is_said_to_stay_stays(checkpoint, train):
    """What the warning says is true: the optimizer's and the scheduler's state hold the old one."""
    same, other = (
        train(f"lr {rate}", resume=str(checkpoint), data=corpus(), max_steps=4, learning_rate=rate, **RECYCLING)
        for rate in (1e-2, 5e-3)
    )
    assert_same_weights(same, other)


def without(checkpoint: Path, folder: Path, *names: str) -> Path:
    """A copy that has no list of its files, as those of earlier versions, and lacks some of them."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    for name in (LIST_FILE, *names):
        (folder / checkpoint.name / name).unlink()
    return folder / checkpoint.name


def test_a_checkpoint_that_is_not_there_is_said_as_by_the_stock_trainer(arguments):
    said = []
    for cls in (Trainer, RecyclingTrainer):
        with pytest.raises(ValueError, match=r"^Can't find a valid checkpoint at nowhere$") as error:
            cls(tiny_bert(), arguments(max_steps=1), train_dataset=masked_sentences(8)).train("nowhere")
        said.append(error.value)
    assert isinstance(said[1], UserError)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_that_is_missing_is_refused(name, checkpoint, tmp_path, train):
    folder = without(checkpoint, tmp_path, name)
    with pytest.raises(UserError, match=rf"{folder}.* {name}"):
        train("next", resume=str(folder), data=corpus(), max_steps=4, **RECYCLING)


@pytest.mark.slow
def test_a_checkpoint_of_the_model_alone_is_refused(train):
    first = train(save_only_model=True, **SAVING, **RECYCLING)
    with pytest.raises(UserError, match=r"no optimizer.pt and no scheduler.pt and no rng_state.pth.*save_only_model"):
        train("next", resume=f"{first.args.output_dir}/checkpoint-2", max_steps=4, **RECYCLING)


@pytest.mark.slow
def test_the_random_state_of_another_number_of_processes_is_said(checkpoint, tmp_path, train, said):
    folder = without(checkpoint, tmp_path)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    train("next", resume=str(folder), data=corpus(), max_steps=4, **RECYCLING)
    assert any("random states of 2 processes and not the one of process 0 of 1" in message for message in said())


@pytest.mark.slow
def test_a_stock_checkpoint_resumes_as_in_the_stock_trainer_whatever_it_lacks(arguments, tokenizer, train, said):
    def stock(folder, resume=None, **settings):
        trainer = Trainer(
            model=tiny_bert(),
            args=arguments(folder, max_steps=4, **settings),
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = stock("first", save_strategy="steps", save_steps=2, save_only_model=True)
    folder = f"{first.args.output_dir}/checkpoint-2"
    expected = stock("stock", folder, seed=7, per_device_train_batch_size=8)
    found = train("ours", resume=folder, masked_head=False, max_steps=4, seed=7, per_device_train_batch_size=8)
    assert_same_weights(expected, found)
    assert losses(expected) == losses(found)
    assert [message for message in said() if "holds no optimizer.pt and no scheduler.pt" in message]


@pytest.mark.slow
def test_optimizer_state_of_another_model_is_refused_in_a_sentence(checkpoint, tmp_path, train):
    folder = without(checkpoint, tmp_path)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    del state["param_groups"][1]["params"][0]
    torch.save(state, folder / "optimizer.pt")
    with pytest.raises(UserError, match=r"state in .*checkpoint-2 is that of another model or optimizer: its groups"):
        train("next", resume=str(folder), data=corpus(), max_steps=4, **RECYCLING)
