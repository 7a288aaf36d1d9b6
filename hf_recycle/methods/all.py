"""All methods in the order in which they act, as the callbacks for a stock `Trainer`."""

from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.l2_init import L2InitCallback
from hf_recycle.methods.magnitudes import MagnitudeCallback
from hf_recycle.methods.midpoint import MidpointLossCallback
from hf_recycle.methods.overtraining.callback import OvertrainingCallback
from hf_recycle.methods.pruning import PruningCallback
from hf_recycle.methods.recycling.callback import RecyclingCallback
from hf_recycle.methods.shrink_perturb import ShrinkPerturbCallback

CALLBACKS: tuple[type[NeuronCallback], ...] = (
    L2InitCallback,
    MidpointLossCallback,
    ShrinkPerturbCallback,
    PruningCallback,
    RecyclingCallback,
    OvertrainingCallback,
    MagnitudeCallback,
)
"""In the order in which their methods act after an optimizer step."""
