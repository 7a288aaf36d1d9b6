"""Resuming a run that has taken all its steps: it trains no further, says so, and ends once more."""

import time

from transformers.utils import logging

from hf_recycle.trainer.base import NeuronTrainer

logger = logging.get_logger(__name__)


class FinishedRunMixin(NeuronTrainer):
    """`train` of a finished run loads its state and ends as the run itself did or would have, had it not been killed
    after its last checkpoint: with the metrics of the whole run, and the best model where that is asked for.
    """

    _finished: str | None = None
    """The checkpoint of a finished run that `train` was called with."""

    _resumed_loss: tuple[float, int] | None = None
    """Of a logging interval that the checkpoint lies in: the sum of its losses so far, and the step it began with."""

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._finished = None
        if resume_from_checkpoint is None or self.state.global_step < max_steps:
            return progress
        self._finished = resume_from_checkpoint
        if self.is_world_process_zero():
            logger.warning(
                f"{resume_from_checkpoint} is of a run that is finished: it has taken {self.state.global_step} of "
                f"{max_steps} steps, and nothing is trained. A larger max_steps (or num_train_epochs) goes on."
            )
        return num_train_epochs, 0  # no epoch is left

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self._finished is not None:
            # Nothing was read of it yet: with training the random state comes back at the first batch.
            self._load_rng_state(self._finished)
            # As if the whole run had been this call.
            start_time = time.time() - (self.meter.reading(0)["seconds"] or 0.0)
            self._initial_global_step = 0
            self._total_loss_scalar = self._loss_of_all_steps()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _loss_of_all_steps(self) -> float:
        """The sum of the losses of all steps: what was logged, each a mean since the one before, and the rest."""
        total, last = 0.0, 0.0
        for row in self.state.log_history:
            if "loss" in row:
                total += row["loss"] * (row["step"] - last)
                last = row["step"]
        rest, self._resumed_loss = self._resumed_loss, None
        return total + (rest[0] if rest else 0.0)
