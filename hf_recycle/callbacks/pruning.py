"""When to prune."""

from transformers.utils import logging

from hf_recycle.callbacks.base import NeuronCallback
from hf_recycle.methods.pruning import PruningSchedule
from hf_recycle.methods.schedule import resolve_steps
from hf_recycle.pruning import hold_at_zero, prune
from hf_recycle.settings import PruningSettings

logger = logging.get_logger(__name__)


class PruningCallback(NeuronCallback):
    """Gradual pruning: a growing share of the FF neurons of each layer is switched off, and stays off.

    Source: *Neuron Recycling*, section "Gradual FF pruning". With `fraction=1.0` only the out-projection's bias is
    left; with `start=0, end=0` everything is pruned before the first step. Steps that the optimizer skips, because a
    gradient scaler found an overflow, do not count; the final share is reached at the last step all the same.

    Takes the settings of `RecyclingArguments` whose names begin with `prune_`, without that prefix. On a stock
    `Trainer` a resumed run has forgotten which neurons were pruned: it chooses anew, among all of them.
    """

    settings_class = PruningSettings
    settings: PruningSettings

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.attach(model, state)
        if self.settings.seed is None:
            self.settings.seed = args.seed
        self.schedule = make_schedule(self.settings, state.max_steps)
        self.watch(optimizer)
        if self.schedule.is_due(0) and state.global_step == 0:
            self._prune(0, 0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.note_step(state)

    def on_step_end(self, args, state, control, **kwargs):
        hold_at_zero(self.table)
        taken = self.table.optimizer_steps(state.global_step)
        if state.global_step == state.max_steps and taken < self.schedule.end:
            self._prune(state.global_step, self.schedule.end)
        elif self._stepped and self.schedule.is_due(taken):
            self._prune(state.global_step, taken)

    def _prune(self, step: int, progress: int) -> None:
        """Prunes, after the Trainer's step `step`, to the share of optimizer step `progress`."""
        if not self.settings.enabled:
            return
        records = prune(self.table, self.settings, self.schedule, progress)
        for record in records:
            if record.requested or record.note:
                self.recorder.pruning(**vars(record) | {"step": step})
        for note in {record.note for record in records if record.note}:
            logger.warning(f"Pruning at step {step} {note}.")

    def scalars(self) -> dict[str, float]:
        """Share of the neurons that are pruned."""
        if self.table is None:
            return {}
        pruned = list(self.table.pruned.values())
        return {"neurons_pruned_share": sum(int(block.sum()) for block in pruned) / sum(map(len, pruned))}


def make_schedule(settings: PruningSettings, max_steps: int) -> PruningSchedule:
    """The course of pruning in a training of `max_steps` steps.

    Raises:
        ValueError: if pruning starts after it ends, or would not reach its share within the training.
    """
    start = resolve_steps(settings.start, max_steps) or 0
    end = max_steps if settings.end is None else resolve_steps(settings.end, max_steps)
    if start > end:
        raise ValueError(f"prune_start={start} is after prune_end={end}: nothing would be pruned.")
    if end > max_steps:
        raise ValueError(
            f"prune_end={end} is after the last of {max_steps} steps: prune_fraction={settings.fraction} would not be "
            "reached; lower it or train longer."
        )
    return PruningSchedule(resolve_steps(settings.steps, max_steps), start, end, settings.fraction, settings.schedule)
