"""When to prune."""

from transformers.utils import logging

from hf_recycle.callbacks.base import NeuronCallback
from hf_recycle.callbacks.method import Method, Run, StepInfo
from hf_recycle.methods.pruning import PruningSchedule
from hf_recycle.neurons.optimizer import check_optimizer
from hf_recycle.pruning import hold_at_zero, prune
from hf_recycle.settings import PruningSettings

logger = logging.get_logger(__name__)


class Pruning(Method):
    """Prunes neurons by its schedule, and keeps them at zero."""

    settings_class = PruningSettings
    settings: PruningSettings

    def start(self, run: Run, settings: PruningSettings) -> None:
        super().start(run, settings)
        check_optimizer(run.optimizer, "prune_fraction", settings.fraction)
        self.schedule = make_schedule(settings, run.max_steps)
        if self.schedule.is_due(0) and run.step == 0:
            self._prune(0, 0)

    def after_step(self, info: StepInfo) -> None:
        hold_at_zero(self.table)
        if info.step == info.max_steps and info.optimizer_steps < self.schedule.end <= info.max_steps:
            # Skipped steps have put it off until now.
            self._prune(info.step, self.schedule.end)
        elif info.stepped and self.schedule.is_due(info.optimizer_steps):
            self._prune(info.step, info.optimizer_steps)

    def _prune(self, step: int, progress: int) -> None:
        """Prunes, after the Trainer's step `step`, to the share of optimizer step `progress`."""
        records = prune(self.table, self.settings, self.schedule, progress, frozen=self.run.frozen())
        for record in records:
            if record.requested or record.note:
                self.run.recorder.pruning(**vars(record) | {"step": step})
        for note in {record.note for record in records if record.note}:
            logger.warning(f"Pruning at step {step} {note}.")

    def scalars(self) -> dict[str, float]:
        """Share of the neurons that are pruned."""
        if self.table is None:
            return {}
        pruned = list(self.table.pruned.values())
        return {"neurons_pruned_share": sum(int(block.sum()) for block in pruned) / sum(map(len, pruned))}


class PruningCallback(NeuronCallback):
    """Gradual pruning: a growing share of the FF neurons of each layer is switched off, and stays off.

    Source: *Neuron Recycling*, section "Gradual FF pruning". With `fraction=1.0` only the out-projection's bias is
    left; with `start=0, end=0` everything is pruned before the first step. Steps that the optimizer skips, because a
    gradient scaler found an overflow, do not count; the final share is reached at the last step all the same. A block
    that is frozen when it is due is left out, which is recorded, and catches up once it is trained again.

    Takes the settings of `RecyclingArguments` whose names begin with `prune_`, without that prefix. On a stock
    `Trainer` a resumed run has forgotten which neurons were pruned: it chooses anew, among all of them.
    """

    method_class = Pruning


def make_schedule(settings: PruningSettings, max_steps: int) -> PruningSchedule:
    """The course of pruning in a training of `max_steps` steps.

    Args:
        settings: resolved.

    Raises:
        ValueError: if pruning starts after it ends, or would not reach its share within the training.
    """
    start, end = settings.start or 0, settings.end
    if start > end:
        raise ValueError(f"prune_start={start} is after prune_end={end}: nothing would be pruned.")
    if end > max_steps:
        raise ValueError(
            f"prune_end={end} is after the last of {max_steps} steps: prune_fraction={settings.fraction} would not be "
            "reached; lower it or train longer."
        )
    return PruningSchedule(settings.steps, start, end, settings.fraction, settings.schedule)
