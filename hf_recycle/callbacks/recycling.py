"""When to recycle."""

from collections.abc import Callable

from transformers.utils import logging

from hf_recycle.callbacks.base import NeuronCallback
from hf_recycle.methods.immunity import is_immune
from hf_recycle.methods.schedule import PhaseSchedule, resolve_steps
from hf_recycle.methods.seeds import generator_for
from hf_recycle.neurons.optimizer import check_can_reset, check_optimizer, check_state
from hf_recycle.phase import run_phase
from hf_recycle.settings import RecyclingSettings
from hf_recycle.transitions import (
    hook_gradients,
    scale_gradients,
    settle,
    show_effective_weights,
    show_new_weights,
)

logger = logging.get_logger(__name__)


class RecyclingCallback(NeuronCallback):
    """Neuron recycling: every `steps` optimizer steps, the least important FF neurons get new weights.

    Source: *Neuron Recycling*, section "Recycling".

    Steps that the optimizer skips, because a gradient scaler found an overflow, do not count: everything happens as if
    their batches had never been. The history notes the Trainer's steps, which do count them.

    Takes the settings of `RecyclingArguments` whose names begin with `recycle_`, without that prefix:
    `RecyclingCallback(steps=1000, fraction=0.1, immunity=2)`.

    On a stock `Trainer` it works with these limits, which `RecyclingTrainer` does not have: a resumed run has forgotten
    which neurons were recycled, immune or in transition (it says so), nothing is saved with checkpoints, and with
    `smooth_steps` the gradients of fading-in neurons are scaled after gradients were clipped instead of before, so that
    the clipping norm counts them in full (no difference without clipping).
    """

    settings_class = RecyclingSettings
    settings: RecyclingSettings

    def __init__(self, **settings):
        super().__init__(**settings)
        self.schedule: PhaseSchedule | None = None
        self.smooth_steps = 0
        self.loss_is_finite: Callable[[], bool] = lambda: True
        self._gradients_scaled = False
        self._state_checked = False
        self._hooks: list = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.attach(model, state)
        settings = self.settings
        if settings.seed is None:
            settings.seed = args.seed
        self.schedule = make_schedule(settings, state.max_steps)
        self.smooth_steps = (resolve_steps(settings.smooth_steps, state.max_steps) or 0) if self.schedule else 0
        if self.schedule is None:
            return
        check_optimizer(optimizer, "recycle_steps", settings.steps)
        check_can_reset(optimizer, settings.optimizer_state)
        self.watch(optimizer)
        self._state_checked = False
        if self.smooth_steps:
            self._hooks = hook_gradients(self.table, self.smooth_steps)
            settle(self.table, self.smooth_steps)
        check_layers(settings, len(self.table.blocks))
        self._check_weights()
        self._check_initial_distribution()
        self._say_what_is_odd()
        if state.global_step > 0 and self.table.phases == 0 and len(self.schedule.phases_until(state.global_step)):
            logger.warning(
                f"Recycling starts at step {state.global_step} of a resumed run without recycling state: "
                "every neuron counts as never recycled."
            )

    def _check_weights(self) -> None:
        for position in self.settings.layers or range(len(self.table.blocks)):
            block = self.table.blocks[position]
            if not all(piece.parameter.requires_grad for piece in block.weight_slices):
                raise ValueError(
                    f"recycle_steps={self.settings.steps} would overwrite the frozen weights of block {block.name!r}, "
                    "which could never learn anew: leave it out by recycle_layers, or train it."
                )
            # What such a reinitialization looks at would be the weights that are still fading in.
            overlap = self.smooth_steps > self.schedule.every and self.settings.reinit != "initial"
            if overlap and block.out_slice.storage.separate_masters:
                raise ValueError(
                    f"recycle_reinit={self.settings.reinit!r} can't be used under DeepSpeed with recycle_smooth_steps="
                    f"{self.smooth_steps}, longer than the {self.schedule.every} steps between phases: shorten it, or "
                    "use recycle_reinit='initial'."
                )

    def _check_initial_distribution(self) -> None:
        # What can't be drawn is said now rather than at the first phase.
        for position in self.settings.layers or range(len(self.table.blocks)):
            view = self.table.views[position]
            roles = {"initial": None, "matched_normal": view.bias_roles}.get(self.settings.reinit, [])
            view.sample_initial(1, generator_for(0, 0, position, "check"), roles)

    def _say_what_is_odd(self) -> None:
        settings, schedule = self.settings, self.schedule
        phases = len(schedule.phases_until(schedule.end))
        if not phases:
            logger.warning(
                f"Recycling is on, but no phase falls into the {schedule.last_step} steps of this training "
                f"(recycle_start={schedule.start}, recycle_steps={schedule.every}, recycle_end={schedule.end})."
            )
        if min(settings.immunity + 1, phases) * settings.fraction > 1 + 1e-9:
            logger.warning(
                f"recycle_immunity={settings.immunity} with recycle_fraction={settings.fraction} leaves fewer eligible "
                "neurons than a phase asks for: later phases will recycle those they find."
            )
        if self.smooth_steps > schedule.every:
            logger.warning(
                f"recycle_smooth_steps={self.smooth_steps} is longer than the {schedule.every} steps between phases: "
                "neurons still in transition are not eligible in the next phase."
            )

    def scale_gradients(self) -> None:
        """Scales the gradients of neurons in transition; `RecyclingTrainer` calls it before it clips gradients."""
        if self.smooth_steps and not self._gradients_scaled:
            scale_gradients(self.table, self.smooth_steps)
            self._gradients_scaled = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.smooth_steps:
            self.scale_gradients()
            show_new_weights(self.table)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.schedule is None:
            return
        self.note_step(state)
        if self.smooth_steps:
            self._gradients_scaled = False
            show_effective_weights(self.table, self.smooth_steps, advance=self._stepped)
        if self._stepped and not self._state_checked:
            # Optimizers make their state at the first step; what is unknown in it is said now, not at the first phase.
            check_state(optimizer, self.table.blocks, self.settings.optimizer_state)
            self._state_checked = True

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self.schedule is None or not self._stepped or state.global_step >= self.schedule.last_step:
            return
        if not self.schedule.is_phase(self.table.optimizer_steps(state.global_step)):
            return
        records = run_phase(
            self.table,
            self.settings,
            self.schedule,
            state.global_step,
            smooth_steps=self.smooth_steps,
            optimizer=optimizer,
            loss_is_finite=self.loss_is_finite(),
        )
        for record in records:
            self.recorder.phase(
                step=record.step,
                phase=record.phase,
                block=record.block,
                requested=record.requested,
                eligible=record.eligible,
                recycled=record.recycled,
                note=record.note,
            )
        for note in {record.note for record in records if record.note}:
            logger.warning(f"Step {state.global_step}: {note}.")

    def _let_go(self) -> None:
        super()._let_go()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def scalars(self) -> dict[str, float]:
        """Recycling events so far, share of neurons ever recycled, neurons in transition and immune neurons."""
        if self.table is None or self.schedule is None:
            return {}
        counts = list(self.table.counts.values())
        total = sum(len(block) for block in counts)
        phase = self.table.phases + 1
        return {
            "neurons_recycled": sum(int(block.sum()) for block in counts),
            "neurons_ever_recycled_share": sum(int((block > 0).sum()) for block in counts) / total,
            "neurons_in_transition": self.table.in_transition,
            "neurons_immune": self.immune(phase),
        }

    def immune(self, phase: int | None = None) -> int:
        """Neurons that the next phase may not select because of their immunity."""
        phase = self.table.phases + 1 if phase is None else phase
        return sum(int(is_immune(s.last_phase, phase, self.settings.immunity).sum()) for s in self.table.states)


def check_layers(settings: RecyclingSettings, blocks: int) -> None:
    """Raises a ValueError if the settings name a block that a model of so many blocks does not have."""
    wrong = [layer for layer in settings.layers or [] if layer >= blocks]
    if wrong:
        raise ValueError(f"recycle_layers={settings.layers} names block {wrong[0]}: there are {blocks} blocks.")


def make_schedule(settings: RecyclingSettings, max_steps: int) -> PhaseSchedule | None:
    """The phases of a training of `max_steps` steps; None if recycling is off.

    Raises:
        ValueError: if recycling starts after it ends.
    """
    every = resolve_steps(settings.steps, max_steps)
    if not every:
        return None
    start = resolve_steps(settings.start, max_steps) or 0
    end = max_steps if settings.end is None else resolve_steps(settings.end, max_steps)
    if start > end:
        raise ValueError(f"recycle_start={start} is after recycle_end={end}: recycling would never happen.")
    return PhaseSchedule(every, start, end, max_steps, settings.fraction, settings.fraction_schedule)
