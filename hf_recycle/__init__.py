"""hf_recycle: a Hugging Face Trainer plugin that studies and reuses feed-forward neurons during pretraining."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_recycle.arguments import RecyclingArguments as RecyclingArguments
    from hf_recycle.callbacks import MagnitudeCallback as MagnitudeCallback
    from hf_recycle.callbacks import MidpointLossCallback as MidpointLossCallback
    from hf_recycle.callbacks import OvertrainingCallback as OvertrainingCallback
    from hf_recycle.callbacks import PruningCallback as PruningCallback
    from hf_recycle.callbacks import RecyclingCallback as RecyclingCallback
    from hf_recycle.history import RecyclingHistory as RecyclingHistory
    from hf_recycle.neurons.find import find_feed_forwards as find_feed_forwards
    from hf_recycle.neurons.magnitudes import neuron_magnitudes as neuron_magnitudes
    from hf_recycle.trainer import RecyclingTrainer as RecyclingTrainer

__version__ = "0.1.0"

# Imported at first use: torch and transformers take seconds, and the command line's --help needs neither.
_HOMES = {
    "RecyclingArguments": "hf_recycle.arguments",
    "RecyclingTrainer": "hf_recycle.trainer",
    "RecyclingCallback": "hf_recycle.callbacks",
    "MidpointLossCallback": "hf_recycle.callbacks",
    "PruningCallback": "hf_recycle.callbacks",
    "OvertrainingCallback": "hf_recycle.callbacks",
    "MagnitudeCallback": "hf_recycle.callbacks",
    "find_feed_forwards": "hf_recycle.neurons.find",
    "neuron_magnitudes": "hf_recycle.neurons.magnitudes",
    "RecyclingHistory": "hf_recycle.history",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
