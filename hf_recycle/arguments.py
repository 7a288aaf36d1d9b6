"""`RecyclingArguments`: `TrainingArguments` with the settings of every method, flat."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainingArguments

from hf_recycle.methods.settings import (
    LARGEST,
    METHODS,
    MOST,
    MagnitudeSettings,
    MidpointSettings,
    OvertrainingSettings,
    PruningSettings,
    RecyclingSettings,
    Settings,
    flat_field,
)

SettingsT = TypeVar("SettingsT", bound=Settings)


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


def _recycle(name: str) -> Any:
    return flat_field(RecyclingSettings, name)


def _midpoint(name: str) -> Any:
    return flat_field(MidpointSettings, name)


def _prune(name: str) -> Any:
    return flat_field(PruningSettings, name)


def _overtrain(name: str) -> Any:
    return flat_field(OvertrainingSettings, name)


@dataclass
class RecyclingArguments(TrainingArguments):
    """Arguments of a `RecyclingTrainer`: every field of `transformers.TrainingArguments`, and those below.

    Numbers of steps are integers, or fractions below 1 of the whole training, as `save_steps`; None or 0 turns a method
    off. A value that is not allowed raises a `ValueError` that names the field, the value and what is allowed.
    """

    recycle_steps: float | None = _recycle("steps")
    recycle_start: float = _recycle("start")
    recycle_end: float | None = _recycle("end")
    recycle_fraction: float = _recycle("fraction")
    recycle_fraction_schedule: str = _recycle("fraction_schedule")
    recycle_selection: str = _recycle("selection")
    recycle_scope: str = _recycle("scope")
    recycle_reinit: str = _recycle("reinit")
    recycle_noise_scale: float = _recycle("noise_scale")
    recycle_immunity: int = _recycle("immunity")
    recycle_smooth_steps: float = _recycle("smooth_steps")
    recycle_optimizer_state: str = _recycle("optimizer_state")
    recycle_layers: list[int] | None = _recycle("layers")
    recycle_seed: int | None = _recycle("seed")

    midpoint_weight: float = _midpoint("weight")
    midpoint_distance: str = _midpoint("distance")
    midpoint_center: str = _midpoint("center")
    midpoint_log: bool = _midpoint("log")
    midpoint_below_only: bool = _midpoint("below_only")

    prune_fraction: float = _prune("fraction")
    prune_start: float = _prune("start")
    prune_end: float | None = _prune("end")
    prune_steps: float = _prune("steps")
    prune_schedule: str = _prune("schedule")
    prune_selection: str = _prune("selection")
    prune_seed: int | None = _prune("seed")

    overtrain_steps: float | None = _overtrain("steps")
    overtrain_batches: int = _overtrain("batches")
    overtrain_subset: str = _overtrain("subset")
    overtrain_fraction: float = _overtrain("fraction")
    overtrain_seed: int | None = _overtrain("seed")

    magnitude_steps: float | None = flat_field(MagnitudeSettings, "steps")

    masked_head: bool = field(
        default=True,
        metadata={"help": "Compute the head of a masked language model on masked positions only: same loss, faster."},
    )
    recompute_activations: bool = field(
        default=True,
        metadata={
            "help": "Compute FF activations again in the backward pass instead of keeping them beside their "
            "pre-activations: the same numbers, less memory. Not with torch_compile, which decides that itself, "
            "gradient checkpointing or ZeRO-3."
        },
    )
    onednn_linear: bool = field(
        default=False,
        metadata={
            "help": "On a CPU, compute float32 linear layers by oneDNN while training, not by PyTorch's usual library: "
            "about twice as fast on AMD's processors from Zen 5 on; sums come in another order, so last digits differ. "
            "Not with torch_compile or DeepSpeed."
        },
    )
    deterministic_masking: bool | None = field(
        default=None,
        metadata={
            "help": "Masks as a pure function of (seed, pass over the data, sample), so that a resumed run sees the "
            "masks of an uninterrupted one. None: yes, unless every method and masked_head are off; then the collator "
            "is left as it is, and training is that of the stock Trainer."
        },
    )
    ff_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Linear layers of the feed-forward blocks, for a model of unknown layout: 'fc1 -> fc2', "
            "'gate + up -> down' or 'fused:Wi -> Wo'."
        },
    )
    ff_blocks: str | None = field(
        default=None,
        metadata={
            "help": "Of a composite model, the part whose feed-forward blocks are meant, by a word of its name: "
            "vision, language, encoder, decoder, ...; None: all parts."
        },
    )
    verify_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Also keep checksums of files over 64 MiB (weights, optimizer) with each checkpoint, which takes "
            "about a second per GB. What has a checksum is compared when training resumes; of other files the size is."
        },
    )
    trust_pickled_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Resume from a repository of the Hub also where DeepSpeed or torch.distributed.checkpoint have to "
            "unpickle the shards of its checkpoint: whoever wrote them can then run any code on this machine."
        },
    )

    hub_tag_steps: bool = field(
        default=False,
        metadata={"help": "Tag the commit of each published checkpoint as step-N. With push_to_hub."},
    )

    if TYPE_CHECKING:
        output_dir: str = ""  # never None once `__post_init__` is through

    def __post_init__(self):
        check_training_numbers(self)
        super().__post_init__()
        self.output_dir = os.path.abspath(self.output_dir)  # also where the working directory changes later
        for method in METHODS:
            self.method_settings(method)

    def method_settings(self, method: type[SettingsT]) -> SettingsT:
        """The settings of one method as they are now, without their prefix.

        Raises:
            ValueError: for a value that is not allowed.
        """
        settings = method(**{item.name: getattr(self, method.prefix + item.name) for item in fields(method)})
        settings.validate(method.prefix)
        return settings

    def method_arguments(self) -> dict[str, Any]:
        """All settings of all methods, flat: what `recycling_config.json` records."""
        names = [method.prefix + item.name for method in METHODS for item in fields(method)]
        names += ["masked_head", "recompute_activations", "onednn_linear", "deterministic_masking"]
        names += ["ff_pattern", "ff_blocks"]
        return {name: getattr(self, name) for name in names}
