"""When the methods act: `TrainerCallback`s, each of which also works on a stock `Trainer`."""

from hf_recycle.callbacks.magnitudes import MagnitudeCallback
from hf_recycle.callbacks.midpoint import MidpointLossCallback
from hf_recycle.callbacks.overtraining import OvertrainingCallback
from hf_recycle.callbacks.pruning import PruningCallback
from hf_recycle.callbacks.recycling import RecyclingCallback

__all__ = [
    "MagnitudeCallback",
    "MidpointLossCallback",
    "OvertrainingCallback",
    "PruningCallback",
    "RecyclingCallback",
]
