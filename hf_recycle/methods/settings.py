"""The table of settings: each method's knobs, their defaults, help and allowed values, once.

`RecyclingArguments` flattens them with a prefix for the Trainer and the command line; callbacks take them without.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from hf_recycle.methods.registry import CRITERIA, FOLDS, REINITIALIZATIONS
from hf_recycle.methods.schedule import FRACTION_SCHEDULES, resolve_steps

Check = Callable[[Any], str | None]

FOLD_HELP = (
    "nothing (none); the out-projection's bias, its mean (mean); the other neurons, as well as they can (least_squares)"
)

MOST = 2**53
"""The largest whole number of a setting: those above are no longer exact where JSON, YAML or a float come between."""
LARGEST = float(np.finfo(np.float32).max)
_SEEDS = 2**64
PARTS = ("ff", "attention", "embeddings")
"""Of a model, for `l2_init_parts`."""


def setting(default: Any, help: str, check: Check) -> Any:
    """A dataclass field with its help and a check that returns what is allowed, or None if the value is fine."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, "check": check})
    return field(default=default, metadata={"help": help, "check": check})


def _steps(value: Any) -> str | None:
    """A number of steps: None, an integer >= 0 or a fraction in (0, 1)."""
    fine = value is None or (_is_number(value) and 0 <= value <= MOST and (value < 1 or value == int(value)))
    return None if fine else "an integer number of steps, or a fraction below 1 of the training, at most 2**53"


def _share(value: Any) -> str | None:
    return None if _is_number(value) and 0 < value <= 1 else "a number in (0, 1]"


def _share_or_none(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value <= 1 else "a number in [0, 1]"


def _some_steps(value: Any) -> str | None:
    return (
        None if value and _steps(value) is None else "a number of steps from 1, or a fraction below 1 of the training"
    )


def _not_negative(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value <= LARGEST else "a number >= 0 that float32 can hold"


def _whole(value: Any, largest: int = MOST) -> str | None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
    return None if fine else f"an integer >= 0, up to {largest}"


def _threshold(value: Any) -> str | None:
    return None if value is None or _is_number(value) else "a number"


def _batches(value: Any) -> str | None:
    return None if value and _whole(value) is None else f"an integer from 1, up to {MOST}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _layers(value: Any) -> str | None:
    fine = value is None or (isinstance(value, list | tuple) and value and all(_whole(v) is None for v in value))
    return None if fine else "a list of block indices"


def _parts(value: Any) -> str | None:
    fine = isinstance(value, list | tuple) and value and set(value) <= {*PARTS, "all"}
    return None if fine else f"all, or a list of some of {', '.join(PARTS)}"


def _kept(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else "a number in [0, 1)"


def _seed(value: Any) -> str | None:
    return None if value is None else _whole(value, largest=_SEEDS - 1)


@dataclass(frozen=True)
class OneOf:
    """A check: the value is one of `choices`, a tuple of names or a table of functions."""

    choices: Iterable[str]

    def __call__(self, value: Any) -> str | None:
        return None if value in list(self.choices) else f"one of {', '.join(self.choices)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


@dataclass
class Settings:
    """Base of one method's settings. `validate` names a field as the user wrote it: with `prefix`, or without."""

    prefix: ClassVar[str] = ""

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """From values by name with the prefix, see `flat`; what is not among them has its default."""
        return cls(**{item.name: values[name] for item in fields(cls) if (name := cls.prefix + item.name) in values})

    @property
    def enabled(self) -> bool:
        raise NotImplementedError

    def validate(self, prefix: str = "") -> None:
        """Raises a ValueError that names the first field with a value that is not allowed."""
        for item in fields(self):
            value = getattr(self, item.name)
            allowed = item.metadata["check"](value)
            if allowed is not None:
                raise ValueError(f"{prefix}{item.name}={value!r} is not allowed: it must be {allowed}.")

    def resolve(self, max_steps: int, seed: int) -> Self:
        """The settings in a training of `max_steps` steps: numbers of steps instead of shares, and `seed`, that of the
        training, where none was given. None stays None."""
        values = {
            item.name: resolve_steps(getattr(self, item.name), max_steps)
            for item in fields(self)
            if item.metadata["check"] in (_steps, _some_steps)
        }
        if getattr(self, "seed", 0) is None:
            values["seed"] = seed
        return replace(self, **values)

    def differing(self, other: Self) -> list[str]:
        """The names of the settings that differ."""
        return [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]


@dataclass
class RecyclingSettings(Settings):
    """Recycling: train, select the least important neurons, reinitialise them, repeat."""

    prefix: ClassVar[str] = "recycle_"

    steps: float | None = setting(None, "Steps between selection phases. None or 0: no recycling.", _steps)
    start: float = setting(0, "First step of recycling.", _steps)
    end: float | None = setting(None, "Last step of recycling. None: the end of training.", _steps)
    fraction: float = setting(0.01, "Share of the neurons recycled per phase (of each layer, or of all).", _share)
    fraction_schedule: str = setting(
        "constant", "The share over time: constant, or a decay to 0 at the end.", OneOf(FRACTION_SCHEDULES)
    )
    selection: str = setting("low_magnitude", f"Selection criterion. {CRITERIA.describe()}.", OneOf(CRITERIA))
    threshold: float | None = setting(
        None,
        "Recycle only neurons whose score is at most this; the fraction caps them. None: no threshold.",
        _threshold,
    )
    min_share: float = setting(
        0.0,
        "With a threshold: recycle nothing before a phase finds this share of all neurons at or below it.",
        _share_or_none,
    )
    scope: str = setting("layer", "Select in each layer, or over all layers together.", OneOf(("layer", "global")))
    reinit: str = setting(
        "initial",
        f"New weights of recycled neurons. {REINITIALIZATIONS.describe()}.",
        OneOf(REINITIALIZATIONS),
    )
    noise_scale: float = setting(
        0.05,
        "copy_noise and split: standard deviation of the noise, in standard deviations of the matrix.",
        _not_negative,
    )
    immunity: int = setting(0, "Phases for which a recycled neuron can't be selected again.", _whole)
    maturity: float = setting(
        0, "Steps for which a recycled neuron can't be selected again, beside the phases of immunity.", _steps
    )
    fold: str = setting("none", f"What recycled neurons did goes to: {FOLD_HELP}.", OneOf(FOLDS))
    probe_batches: int = setting(
        8, "Extra batches that criteria, folds and births which need data look at in each phase.", _batches
    )
    smooth_steps: float = setting(0, "Optimizer steps over which new weights fade in. 0: at once.", _steps)
    optimizer_state: str = setting(
        "reset",
        "Optimizer state of recycled neurons. reset: first moment zero, second moment the mean of the others'; "
        "zero: both zero; keep: unchanged (as in the article).",
        OneOf(("reset", "zero", "keep")),
    )
    layers: list[int] | None = setting(None, "Indices of the FF blocks to recycle. None: all.", _layers)
    seed: int | None = setting(None, "Seed of the method's own random generators. None: the training seed.", _seed)

    @property
    def enabled(self) -> bool:
        return bool(self.steps)

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        _check_order(prefix, self.start, self.end, "recycling would never happen")
        if self.min_share and self.threshold is None:
            raise ValueError(
                f"{prefix}min_share={self.min_share:g} needs {prefix}threshold, which says what neurons are counted: "
                f"with {prefix}selection='dormant' 0.025 is usual."
            )
        if self.fold != "none" and self.smooth_steps:
            raise ValueError(
                f"{prefix}fold={self.fold!r} can't be used with {prefix}smooth_steps={self.smooth_steps:g}: what fades "
                "out goes on doing what it did meanwhile, so that nothing is to be folded; leave one of them out."
            )
        if self.reinit == "split" and (self.fraction > 0.5 or self.scope == "global"):
            name, value = ("fraction", self.fraction) if self.fraction > 0.5 else ("scope", self.scope)
            raise ValueError(
                f"{prefix}reinit='split' can't be used with {prefix}{name}={value!r}: each newborn needs a neuron of "
                f"its own layer to share with; use at most {prefix}fraction=0.5 of each layer."
            )

    def resolve(self, max_steps: int, seed: int) -> Self:
        resolved = super().resolve(max_steps, seed)
        # A decay has to end somewhere; a constant share goes on for as long as the training does.
        return resolved if resolved.fraction_schedule == "constant" else _ending(resolved, max_steps)


def _check_order(prefix: str, start: float | None, end: float | None, consequence: str) -> None:
    """Refuses a start after the end, where the two can be compared without knowing the length of the training."""
    start = start or 0
    comparable = end is not None and (start < 1) == (end < 1 and end != 0)
    if end is not None and (comparable or start == 0) and start > end:
        raise ValueError(f"{prefix}start={start:g} is after {prefix}end={end:g}: {consequence}.")


def _ending(settings: Any, max_steps: int) -> Any:
    """Resolved settings whose end, if none was given, is the end of the training."""
    return replace(settings, end=max_steps) if settings.end is None else settings


@dataclass
class MidpointSettings(Settings):
    """Midpoint loss: a plain gradient step that evens out neuron magnitudes."""

    prefix: ClassVar[str] = "midpoint_"

    weight: float = setting(0.0, "Weight of the midpoint loss. 0: off.", _not_negative)
    distance: str = setting("l1", "Distance from the center: l1 or l2.", OneOf(("l1", "l2")))
    center: str = setting("mean", "Center of a layer's magnitudes: mean or median.", OneOf(("mean", "median")))
    log: bool = setting(False, "Logarithm of the magnitudes instead of the magnitudes.", _flag)
    below_only: bool = setting(False, "Only neurons below the center.", _flag)

    @property
    def enabled(self) -> bool:
        return self.weight > 0


@dataclass
class PruningSettings(Settings):
    """Gradual pruning of the FF blocks: a growing share of the neurons is zeroed for good."""

    prefix: ClassVar[str] = "prune_"

    fraction: float = setting(
        0.0, "Final share of the FF neurons of each layer that is pruned. 0: off.", _share_or_none
    )
    start: float = setting(0, "Step at which the pruned share begins to grow.", _steps)
    end: float | None = setting(None, "Step at which the final share is reached. None: the end of training.", _steps)
    steps: float = setting(100, "Steps between prunings.", _some_steps)
    schedule: str = setting("linear", "Growth of the share: linear, or cubic (fast first).", OneOf(("linear", "cubic")))
    selection: str = setting("low_magnitude", f"Selection criterion. {CRITERIA.describe()}.", OneOf(CRITERIA))
    fold: str = setting("none", f"What pruned neurons did goes to: {FOLD_HELP}.", OneOf(FOLDS))
    probe_batches: int = setting(
        8, "Extra batches that criteria and folds which need data look at in each pruning.", _batches
    )
    seed: int | None = setting(None, "Seed of the method's own random generators. None: the training seed.", _seed)

    @property
    def enabled(self) -> bool:
        return self.fraction > 0

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        _check_order(prefix, self.start, self.end, "nothing would be pruned")

    def resolve(self, max_steps: int, seed: int) -> Self:
        return _ending(super().resolve(max_steps, seed), max_steps)


@dataclass
class OvertrainingSettings(Settings):
    """Overtraining: every so often the FF neurons alone, or some of them, are trained on extra batches."""

    prefix: ClassVar[str] = "overtrain_"

    steps: float | None = setting(None, "Steps between overtrainings. None or 0: no overtraining.", _steps)
    batches: int = setting(
        0, "Extra batches each time: per_device_train_batch_size on each process, one optimizer step each.", _whole
    )
    subset: str = setting(
        "all",
        "Neurons of each layer that are trained, by magnitude.",
        OneOf(("all", "smallest", "largest", "random")),
    )
    fraction: float = setting(1.0, "Share of each layer's neurons in the subset; not for all.", _share)
    seed: int | None = setting(
        None, "Seed of the extra batches, their masks and the random subset. None: the training seed.", _seed
    )

    @property
    def enabled(self) -> bool:
        return bool(self.steps)

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if bool(self.steps) != bool(self.batches):
            given, missing = ("steps", "batches") if self.steps else ("batches", "steps")
            raise ValueError(
                f"{prefix}{given}={getattr(self, given):g} needs {prefix}{missing} too: set {prefix}steps to the steps "
                f"between overtrainings and {prefix}batches to the extra batches each time, or leave both out."
            )
        if self.subset == "all" and self.fraction != 1:
            raise ValueError(
                f"{prefix}fraction={self.fraction:g} can't be used with {prefix}subset='all': choose smallest, largest "
                "or random."
            )


@dataclass
class MagnitudeSettings(Settings):
    """Histograms of neuron magnitudes over training."""

    prefix: ClassVar[str] = "magnitude_"

    steps: float | None = setting(None, "Record magnitude histograms every so many steps. None or 0: never.", _steps)

    @property
    def enabled(self) -> bool:
        return bool(self.steps)


@dataclass
class L2InitSettings(Settings):
    """L2 to the initial weights: a decay towards the weights that training began with."""

    prefix: ClassVar[str] = "l2_init_"

    weight: float = setting(0.0, "Strength of the decay towards the initial weights. 0: off.", _not_negative)
    parts: list[str] = setting(["all"], f"What decays: all, or some of {', '.join(PARTS)}.", _parts)

    @property
    def enabled(self) -> bool:
        return self.weight > 0


@dataclass
class ShrinkPerturbSettings(Settings):
    """Shrink and perturb: every so often all weights are mixed with fresh ones."""

    prefix: ClassVar[str] = "shrink_perturb_"

    steps: float | None = setting(None, "Mix in fresh weights every so many steps. None or 0: never.", _steps)
    keep: float = setting(0.9, "Share of the old weights in the mixture.", _kept)
    seed: int | None = setting(None, "Seed of the fresh weights. None: the training seed.", _seed)

    @property
    def enabled(self) -> bool:
        return bool(self.steps)


METHODS: tuple[type[Settings], ...] = (
    RecyclingSettings,
    MidpointSettings,
    PruningSettings,
    OvertrainingSettings,
    L2InitSettings,
    ShrinkPerturbSettings,
    MagnitudeSettings,
)


def flat(settings: Settings) -> dict[str, Any]:
    """The settings with their prefix, as in the JSON of a checkpoint, which knows no tuples."""
    values = {settings.prefix + item.name: getattr(settings, item.name) for item in fields(settings)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def flat_fields(settings: type[Settings]) -> list[tuple[str, Any, Any]]:
    """The fields of a method's settings as (name, type, field) of a flat dataclass: with their prefix, the same
    defaults and help, and the names to choose from where there are such."""
    found = []
    for item in fields(settings):
        metadata = {"help": item.metadata["help"]}
        if isinstance(check := item.metadata["check"], OneOf):
            metadata["choices"] = check.choices
        default = {"default": item.default, "default_factory": item.default_factory}
        kept: Any = {name: value for name, value in default.items() if value is not MISSING}
        found.append((settings.prefix + item.name, item.type, field(**kept, metadata=metadata)))
    return found
