"""When the methods act: one coordinator, the methods, and a `TrainerCallback` for each, for a stock `Trainer`."""

from hf_recycle.callbacks.base import NeuronCallback, NeuronMethods
from hf_recycle.callbacks.magnitudes import MagnitudeCallback
from hf_recycle.callbacks.midpoint import MidpointLossCallback
from hf_recycle.callbacks.overtraining import OvertrainingCallback
from hf_recycle.callbacks.pruning import PruningCallback
from hf_recycle.callbacks.recycling import RecyclingCallback

__all__ = [
    "CALLBACKS",
    "MagnitudeCallback",
    "MidpointLossCallback",
    "NeuronMethods",
    "OvertrainingCallback",
    "PruningCallback",
    "RecyclingCallback",
]

CALLBACKS: tuple[type[NeuronCallback], ...] = (
    MidpointLossCallback,
    PruningCallback,
    RecyclingCallback,
    OvertrainingCallback,
    MagnitudeCallback,
)
"""In the order in which their methods act after an optimizer step."""
