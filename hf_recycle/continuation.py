"""Whether a run goes on as its checkpoint began: the state that must be there, and what it was trained with.

What would go on silently wrong is refused. What may be changed on purpose is said in a sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import Trainer
from transformers.trainer import SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_recycle.errors import UserError
from hf_recycle.files import RECYCLING_FILES
from hf_recycle.optimizer_files import OPTIMIZER_FILES

logger = logging.get_logger(__name__)

# They settle which examples come next.
_ORDER = (
    "seed",
    "data_seed",
    "examples",
    "checksum of the first examples",
    "batch_size",
    "dataloader_drop_last",
    "sampling",
)
# In force again once the optimizer's state is loaded, whatever the arguments say.
_KEPT = ("learning_rate", "weight_decay")
# From here on those of the arguments.
_CHANGED = ("mask_rate", "lr_scheduler_type", "precision")


# ---- The state that must be there ----


def check_state_is_there(trainer: Trainer, folder: Path) -> None:
    """Refuses a checkpoint of ours without the state of optimizer, scheduler or random generators; of one that the
    stock Trainer wrote, which resumes without, it says so.

    Raises:
        UserError: on every process.
    """
    missing = _missing_state(trainer, folder)
    random_states = list(folder.glob("rng_state*.pth"))
    if not random_states:
        missing.append(_random_state_of(trainer))
    if missing and any(Path(folder, name).exists() for name in RECYCLING_FILES):
        raise UserError(
            f"The checkpoint {folder} holds no {' and no '.join(missing)}, without which training would silently go on "
            "as another one (save_only_model=True keeps only the model): resume from another checkpoint, or start a "
            f"new run from its weights (model_name_or_path={str(folder)!r})."
        )
    if missing:
        logger.warning(
            f"The checkpoint {folder} holds no {' and no '.join(missing)}: they begin anew, and the run will not be "
            "what it would have been without the interruption."
        )
    elif not Path(folder, _random_state_of(trainer)).is_file():
        logger.warning(
            f"The checkpoint {folder} holds the random states of {len(random_states)} processes and not the one of "
            f"process {trainer.args.process_index} of {trainer.args.world_size}: dropout and whatever else draws "
            "random numbers draws others than without the interruption."
        )


def _missing_state(trainer: Trainer, folder: Path) -> list[str]:
    if trainer.is_deepspeed_enabled:
        return []  # DeepSpeed's own files hold it, see `check_resumable`
    wanted = [(OPTIMIZER_FILES[0], OPTIMIZER_FILES), (SCHEDULER_NAME, (SCHEDULER_NAME,))]
    if getattr(trainer.accelerator, "scaler", None) is not None:
        wanted.append((SCALER_NAME, (SCALER_NAME,)))
    return [name for name, files in wanted if not any(Path(folder, file).exists() for file in files)]


def _random_state_of(trainer: Trainer) -> str:
    args = trainer.args
    return "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"


# ---- What it was trained with ----


def made_with(trainer: Trainer) -> dict[str, Any]:
    """What decides how a training goes on, as JSON: for `training` in `recycling_config.json`.

    To be asked when training begins: a callback may change a mask rate while it runs.
    """
    args, dataset = trainer.args, trainer.train_dataset
    facts = {
        "optimizer": _class_of(trainer.optimizer),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "dataloader_drop_last": args.dataloader_drop_last,
        "sampling": args.train_sampling_strategy,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "full",
    }
    if not args.auto_find_batch_size:  # it may be found anew
        facts["batch_size"] = trainer.get_total_train_batch_size(args)
    if has_length(dataset):
        facts["examples"] = len(dataset)
    if (checksum := _first_examples(dataset)) is not None:
        facts["checksum of the first examples"] = checksum
    rate = getattr(trainer.data_collator, "mlm_probability", None)
    if isinstance(rate, int | float):
        facts["mask_rate"] = rate
    return facts


def check_continues(folder: str | Path, before: Mapping[str, Any], now: Mapping[str, Any], any_data: bool) -> None:
    """Compares what a checkpoint was made with to what this run has; what either doesn't know is left alone.

    Args:
        any_data: `ignore_data_skip`: the run means to see other examples than without the interruption.

    Raises:
        UserError: the optimizer is another one; or other examples would come, and `any_data` is false.
    """

    def differing(*names: str) -> str:
        known = [name for name in names if name in before and name in now]
        return ", ".join(f"{name}={before[name]!r} (now {now[name]!r})" for name in known if before[name] != now[name])

    if other := differing("optimizer"):
        raise UserError(
            f"The checkpoint {folder} was made with {other}, whose state is another: resume it with the same "
            "optimizer, or start a new run from its weights."
        )
    if other := differing(*_ORDER):
        if not any_data:
            raise UserError(
                f"The checkpoint {folder} was made with {other}, so other examples would come than those it has not "
                "seen yet: resume it with the same, or set ignore_data_skip=True to begin the epoch's data anew."
            )
        logger.warning(f"The checkpoint {folder} was made with {other}: its epoch's data begin anew.")
    if other := differing(*_KEPT):
        logger.warning(
            f"The checkpoint {folder} was made with {other}: training goes on with the checkpoint's, which its "
            "optimizer and scheduler hold; for another one start a new run from its weights."
        )
    if other := differing(*_CHANGED):
        logger.warning(f"The checkpoint {folder} was made with {other}: training goes on with the one of now.")


def _class_of(optimizer: Any) -> str:
    while (inner := getattr(optimizer, "optimizer", None)) is not None:  # Accelerate's and DeepSpeed's lie around it
        optimizer = inner
    return type(optimizer).__name__


def _first_examples(dataset: Any) -> str | None:
    """A checksum of the first, middle and last sequence of tokens, where reading them changes nothing."""
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names or not len(dataset):
        return None
    # Without the transforms of the user, which may draw random numbers.
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})
    rows = dataset.select_columns("input_ids").with_format("arrow")[places]
    return hashlib.sha256(repr(rows["input_ids"].to_pylist()).encode()).hexdigest()[:16]
