"""When to take the midpoint step."""

import torch
from transformers.utils import logging

from hf_recycle.callbacks.base import NeuronCallback
from hf_recycle.methods.midpoint import MidpointLoss
from hf_recycle.neurons.optimizer import StepWatch, check_optimizer
from hf_recycle.settings import MidpointSettings

logger = logging.get_logger(__name__)


class MidpointLossCallback(NeuronCallback):
    """Midpoint loss: after every optimizer step, one plain gradient step that evens out neuron magnitudes.

    Source: *Neuron Recycling*, section "Tangent - Midpoint Loss". W ← W − lr · weight · ∇Loss, with the learning
    rate of the optimizer step just taken, no momentum, not clipped; pruned neurons and neurons in
    transition are left out. With a learning
    rate of 1e-3 and a weight of 1e-7 the step is below the resolution of float32 and changes no weight; that is said
    once.

    Takes the settings of `RecyclingArguments` whose names begin with `midpoint_`, without that prefix. On a stock
    `Trainer` it does all it does on a `RecyclingTrainer`, except that its loss is not logged.
    """

    settings_class = MidpointSettings
    settings: MidpointSettings

    def __init__(self, **settings):
        super().__init__(**settings)
        chosen = self.settings
        self._method = MidpointLoss(chosen.distance, chosen.center, chosen.log, chosen.below_only)
        self._watch: StepWatch | None = None
        self._loss: torch.Tensor | None = None
        self._checked_for_effect = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.attach(model, state)
        if self._watch is not None:
            self._watch.remove()
        if self.settings.enabled:
            check_optimizer(optimizer, "midpoint_weight", self.settings.weight)
        self._watch = StepWatch(optimizer)
        half = [
            piece.dtype
            for block in self.table.blocks
            for piece in block.slices
            if piece.dtype.itemsize < 4 and not piece.storage.separate_masters
        ]
        if self.settings.enabled and half:
            raise ValueError(
                f"midpoint_weight={self.settings.weight} can't be used with {half[0]} weights, in which its small "
                "steps are lost: load the model in float32 and train with bf16=True or fp16=True (autocast) instead."
            )

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if not self.settings.enabled or not self._watch.taken:
            return
        losses, changed = [], []
        for block, neurons in zip(self.table.blocks, self.table.states, strict=True):
            in_norm, out_norm = block.norms()
            included = ~(neurons.in_transition() | neurons.pruned).to(in_norm.device)
            loss, in_slope, out_slope = self._method.slopes(in_norm, out_norm, included)
            losses.append(loss)
            for piece in (*block.in_slices, block.out_slice):
                slope = out_slope if piece.role == "out" else in_slope
                factors = 1 - self._watch.rate(piece) * self.settings.weight * slope
                piece.storage.scale(piece, factors)
                if not self._checked_for_effect:
                    highest = self._watch.highest_rate(piece)
                    changed.append((1 - highest * self.settings.weight * slope != 1).any())
        self._watch.reset()
        self._loss = torch.stack(losses).sum()
        if not self._checked_for_effect:
            self._checked_for_effect = True
            if not torch.stack(changed).any():
                logger.warning(
                    f"midpoint_weight={self.settings.weight} changes no weight at this learning rate: the step is "
                    "below the resolution of the weights' dtype."
                )

    def on_train_end(self, args, state, control, **kwargs):
        self._watch.remove()
        self._watch = None

    def scalars(self) -> dict[str, float]:
        """The midpoint loss before the last step, unweighted, summed over blocks."""
        return {} if self._loss is None else {"midpoint_loss": float(self._loss)}
