"""What transformers keeps to itself (seen in transformers 5.23); what our mixins use of `Trainer` lists
`tests/test_internals.py`."""

from collections.abc import Collection
from typing import Any

from torch import nn

INITIALIZED = "_is_hf_initialized"
"""The attribute of a module or a tensor whose values are there already: initialisers leave it alone."""


def initialize(owner: Any, module: nn.Module) -> None:
    """Initialises the parameters of `module` itself as the model `owner` does. The public `initialize_weights` does it
    for a whole model, and leaves out what was loaded."""
    owner._init_weights(module)


def has_class_for(auto_class: Any, config: Any) -> bool:
    """Whether an auto class (`AutoModelForMaskedLM`, ...) has a model for such a configuration."""
    return type(config) in auto_class._model_mapping


def unsplit_classes(model: nn.Module) -> Collection[str]:
    """The names of the classes of layers that a model wants to have in one shard or on one device."""
    return getattr(model, "_no_split_modules", None) or ()


def is_from_files(model: nn.Module) -> bool:
    """Whether `from_pretrained` made the model. One that only took its configuration from elsewhere says the same name
    or path."""
    return hasattr(model, "_weight_conversions")


def names_not_saved(model: nn.Module) -> Collection[str]:
    """The tensors that `save_pretrained` leaves out, because the model makes them anew."""
    return getattr(model, "_keys_to_ignore_on_save", None) or ()


def patterns_not_loaded(model: nn.Module) -> Collection[str]:
    """Regular expressions for the names of tensors in files that the model's class no longer has."""
    return getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()


def note_commit(config: Any, commit: str | None) -> None:
    """Notes in a configuration the commit that the weights came from: transformers has the place and leaves it empty,
    and never writes it to config.json."""
    config._commit_hash = commit
