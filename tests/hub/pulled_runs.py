"""A tiny run with checkpoints, trained once, for tests that put its checkpoints into repositories."""

import io
from pathlib import Path

import torch
from support.tiny_runs import sentences, tiny_bert
from support.words import word_tokenizer
from transformers import DataCollatorForLanguageModeling

from hf_recycle import RecyclingArguments, RecyclingTrainer
from hf_recycle.hub.address import HubAddress
from hf_recycle.hub.pull.pull import plan

STEPS = 8
# A checkpoint every second step, each in the middle of a fade-in.
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "recycle_steps": 3,
    "recycle_fraction": 0.1,
    "recycle_smooth_steps": 4,
    "recycle_immunity": 1,
    "midpoint_weight": 0.05,
    "magnitude_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def new_trainer(folder: Path, **overrides) -> RecyclingTrainer:
    """A trainer whose model, data and settings are the same every time."""
    return RecyclingTrainer(
        model=tiny_bert(),
        args=RecyclingArguments(output_dir=str(folder), **(SETTINGS | overrides)),
        train_dataset=sentences(),
        data_collator=DataCollatorForLanguageModeling(word_tokenizer()),
        processing_class=word_tokenizer(),
    )


def contents(folder: Path, prefix: str) -> dict[str, bytes]:
    """The files of a folder, as files of a repository under a prefix."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


def pull_checkpoint(text: str, token: str | None = None, trust_pickled: bool = False) -> Path:
    """The local folder of the checkpoint at `hf://user/repo[@revision][/folder]`."""
    return plan(HubAddress.parse(text), token, trust_pickled).fetch(token)


def saved(value) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
