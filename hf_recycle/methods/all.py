"""When the methods act: one coordinator, the methods, and a `TrainerCallback` for each, for a stock `Trainer`."""

from hf_recycle.methods.coordinator import NeuronCallback, NeuronMethods
from hf_recycle.methods.magnitudes import MagnitudeCallback
from hf_recycle.methods.midpoint import MidpointLossCallback
from hf_recycle.methods.overtraining.callback import OvertrainingCallback
from hf_recycle.methods.pruning import PruningCallback
from hf_recycle.methods.recycling.callback import RecyclingCallback

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
