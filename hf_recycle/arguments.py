"""`RecyclingArguments`: `TrainingArguments` with the settings of every method, flat."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_recycle.methods.arguments import OwnArguments
from hf_recycle.methods.presets import PRESETS, preset_values
from hf_recycle.methods.settings import LARGEST, METHODS, MOST, Settings

SettingsT = TypeVar("SettingsT", bound=Settings)

MUON = "muon"
"""An optimizer that transformers has no name for, see `hf_recycle.trainer.muon`."""
OPTIMIZERS = [*(each.value for each in OptimizerNames), MUON]


def check_training_numbers(arguments: TrainingArguments) -> None:
    """Refuses numbers of the Trainer's own arguments that no training can come well out of, and on which it would go
    astray without a word.

    Raises:
        ValueError: that names the argument, its value and what is allowed.
    """
    numbers = ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "num_train_epochs")
    limits = dict.fromkeys(numbers, LARGEST) | {"max_steps": MOST}
    for name, largest in limits.items():
        value = getattr(arguments, name)
        endless = name == "max_grad_norm" and value == math.inf  # no clipping, as many write it
        if isinstance(value, int | float) and not endless and not abs(value) <= largest:
            raise ValueError(f"{name}={value!r} is not allowed: it must be a number, at most {largest:.3g} in size.")


@dataclass(repr=False)
class RecyclingArguments(OwnArguments, TrainingArguments):
    """Arguments of a `RecyclingTrainer`: every field of `transformers.TrainingArguments`, and those of
    `OwnArguments`, which docs/arguments.md lists.

    Numbers of steps are integers, or fractions below 1 of the whole training, as `save_steps`; None or 0 turns a method
    off. A value that is not allowed raises a `ValueError` that names the field, the value and what is allowed.
    """

    optim: str = field(
        default=TrainingArguments.optim,
        metadata={
            "help": "The optimizer: one that transformers names (OptimizerNames), or muon: Muon for the matrices in "
            "layers, AdamW for everything else; optim_args takes momentum, nesterov, ns_steps and adjust_lr_fn.",
            "choices": OPTIMIZERS,
        },
    )

    if TYPE_CHECKING:
        output_dir: str = ""  # never None once `__post_init__` is through

    def __post_init__(self):
        self._begin_with_preset()
        check_training_numbers(self)
        chosen = self.optim
        if chosen not in OPTIMIZERS:
            raise ValueError(f"optim={chosen!r} is not allowed: it must be one of {', '.join(OPTIMIZERS)}.")
        if chosen == MUON:
            self.optim = TrainingArguments.optim  # one that the parent class knows
        super().__post_init__()
        if chosen == MUON:
            self.optim = MUON
        self.output_dir = os.path.abspath(self.output_dir)  # also where the working directory changes later
        for method in METHODS:
            self.method_settings(method)

    def _begin_with_preset(self) -> None:
        """Gives arguments that are at their defaults the preset's values."""
        if self.preset is None:
            return
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not allowed: it must be one of {', '.join(PRESETS)}.")
        defaults = {item.name: item.default for item in fields(self)}
        for name, value in preset_values(self.preset).items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)

    def method_settings(self, method: type[SettingsT]) -> SettingsT:
        """The settings of one method as they are now, without their prefix.

        Raises:
            ValueError: for a value that is not allowed.
        """
        settings = method.from_flat(vars(self))
        settings.validate(method.prefix)
        return settings

    def method_arguments(self) -> dict[str, Any]:
        """All settings of all methods, flat: what `recycling_config.json` records."""
        names = [method.prefix + item.name for method in METHODS for item in fields(method)]
        names += ["masked_head", "chunked_head", "recompute_activations", "onednn_linear", "deterministic_masking"]
        names += ["ff_pattern", "ff_blocks"]
        return {name: getattr(self, name) for name in names}
