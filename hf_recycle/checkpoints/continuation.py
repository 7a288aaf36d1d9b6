"""Whether a run goes on as its checkpoint began: with the same optimizer, examples and settings.

A difference that would silently make another run is refused; one that may be on purpose causes a warning.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_recycle.card.run_facts import precision
from hf_recycle.engines.resume import EngineCheckpointMixin
from hf_recycle.errors import UserError
from hf_recycle.trainer.base import NeuronTrainer

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
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# From here on those of the arguments.
_CHANGED = ("mask_rate", "lr_scheduler_type", "precision")


class ContinuationMixin(EngineCheckpointMixin, NeuronTrainer):
    """Compares a run with the one that wrote its checkpoint, and knows which step's model it has.

    Attributes:
        made_with: what the training was begun with, see `made_with`; None before it begins.
        checkpoint_made_with: the same of the checkpoint it goes on from; None where that doesn't tell.
        best_step: the step of the best model, once it was loaded at the end.
    """

    made_with: dict[str, Any] | None = None
    checkpoint_made_with: dict[str, Any] | None = None
    best_step: int | None = None

    @property
    def model_step(self) -> int:
        """The optimizer steps that the model has taken: after `load_best_model_at_end` fewer than the run."""
        return self.state.global_step if self.best_step is None else self.best_step

    def _init_training_state(self, *args, **kwargs):
        self.best_step = self.checkpoint_made_with = None
        return super()._init_training_state(*args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.made_with = made_with(self)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.checkpoint_made_with is not None:
            check_continues(checkpoint, self.checkpoint_made_with, made_with(self), self.args.ignore_data_skip)
        super()._load_optimizer_and_scheduler(checkpoint)


def made_with(trainer: NeuronTrainer) -> dict[str, Any]:
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
        "examples": len(dataset) if has_length(dataset) else None,
        **{name: getattr(args, name) for name in _KEPT},
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "precision": precision(trainer),
    }
    if not args.auto_find_batch_size:  # it may be found anew
        facts["batch_size"] = trainer.get_total_train_batch_size(args)
    if (checksum := _first_examples(dataset)) is not None:
        facts["checksum of the first examples"] = checksum
    rate = getattr(trainer.data_collator, "mlm_probability", None)
    if isinstance(rate, int | float):
        facts["mask_rate"] = rate
    return {name: value if _is_plain(value) else str(value) for name, value in facts.items()}


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


def _is_plain(value: Any) -> bool:
    """Whether JSON knows a value; it has no number for infinity."""
    return value is None or (type(value) in (bool, int, float, str) and value not in (math.inf, -math.inf))


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
