"""hf_recycle: a Hugging Face Trainer plugin that studies and reuses feed-forward neurons during pretraining."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_recycle.arguments import RecyclingArguments as RecyclingArguments
    from hf_recycle.methods.all import L2InitCallback as L2InitCallback
    from hf_recycle.methods.all import MagnitudeCallback as MagnitudeCallback
    from hf_recycle.methods.all import MidpointLossCallback as MidpointLossCallback
    from hf_recycle.methods.all import OvertrainingCallback as OvertrainingCallback
    from hf_recycle.methods.all import PruningCallback as PruningCallback
    from hf_recycle.methods.all import RecyclingCallback as RecyclingCallback
    from hf_recycle.methods.all import ShrinkPerturbCallback as ShrinkPerturbCallback
    from hf_recycle.neurons.find import find_feed_forwards as find_feed_forwards
    from hf_recycle.neurons.magnitudes import neuron_magnitudes as neuron_magnitudes
    from hf_recycle.records.history import RecyclingHistory as RecyclingHistory
    from hf_recycle.trainer.trainer import RecyclingTrainer as RecyclingTrainer

__version__ = "0.2.0"

# Imported at first use: torch and transformers take seconds, and the command line's --help needs neither.
_HOMES = {
    "RecyclingArguments": "hf_recycle.arguments",
    "RecyclingTrainer": "hf_recycle.trainer.trainer",
    "RecyclingCallback": "hf_recycle.methods.all",
    "MidpointLossCallback": "hf_recycle.methods.all",
    "PruningCallback": "hf_recycle.methods.all",
    "OvertrainingCallback": "hf_recycle.methods.all",
    "MagnitudeCallback": "hf_recycle.methods.all",
    "L2InitCallback": "hf_recycle.methods.all",
    "ShrinkPerturbCallback": "hf_recycle.methods.all",
    "find_feed_forwards": "hf_recycle.neurons.find",
    "neuron_magnitudes": "hf_recycle.neurons.magnitudes",
    "RecyclingHistory": "hf_recycle.records.history",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
