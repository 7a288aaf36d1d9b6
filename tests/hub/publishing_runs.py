"""Tiny runs that publish, for the tests of publishing."""

from pathlib import Path

from support.tiny_runs import sentences, tiny_bert
from support.words import word_tokenizer
from transformers import DataCollatorForLanguageModeling

from hf_recycle import RecyclingArguments, RecyclingTrainer
from hf_recycle.hub.retry import RetryPolicy

# The waits of the shipped policy, a hundred times as fast.
QUICK = RetryPolicy(first=0.01, longest=0.6, patience=36.0, last_patience=20.0)


class QuickTrainer(RecyclingTrainer):
    push_policy = QUICK


def make_trainer(folder: Path, *, callbacks=None, **overrides) -> RecyclingTrainer:
    """Six steps, a checkpoint after every second one."""
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "recycle_steps": 2,
        "recycle_fraction": 0.1,
        "use_cpu": True,
        "disable_tqdm": True,
        "push_to_hub": True,
    }
    tokenizer = word_tokenizer()
    return QuickTrainer(
        model=tiny_bert(),
        args=RecyclingArguments(**(values | overrides)),
        train_dataset=sentences(),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def train_and_publish(folder: Path, **overrides) -> RecyclingTrainer:
    trainer = make_trainer(folder, **overrides)
    trainer.train()
    return trainer
