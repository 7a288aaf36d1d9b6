"""The method `Recycling`: when selection phases happen, and what fades in between; and its public callback."""

from collections.abc import Sequence

from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from hf_recycle.methods.base import Method, Run, StepInfo
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.folding import check_can_fold
from hf_recycle.methods.probe import Probe
from hf_recycle.methods.recycling.fade_in import (
    blend_weights,
    hook_gradients,
    restore_new_weights,
    resume_fade_ins,
    scale_gradients,
)
from hf_recycle.methods.recycling.phase import needs_of_settings, run_phase
from hf_recycle.methods.recycling.selection import is_immune
from hf_recycle.methods.schedule import PhaseSchedule, resolved
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.optimizer_state import check_can_reset, check_optimizer, check_state, check_was_reset
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records.recorder import LEFT_ALONE
from hf_recycle.utils.seeds import generator_for

logger = logging.get_logger(__name__)


class Recycling(Method[RecyclingSettings]):
    """Runs the selection phases, and carries neurons from their old to their new weights."""

    settings_class = RecyclingSettings
    needs_loss = True
    _hooks: Sequence[RemovableHandle] = ()

    def check_blocks(self, blocks: list[FeedForward]) -> None:
        wrong = [layer for layer in self.given.layers or [] if layer >= len(blocks)]
        if wrong:
            raise ValueError(
                f"recycle_layers={self.given.layers} names block {wrong[0]}: there are {len(blocks)} blocks."
            )

    def start(self, run: Run, settings: RecyclingSettings) -> None:
        super().start(run, settings)
        self.schedule = make_schedule(settings, run.max_steps)
        self.smooth_steps = resolved(settings.smooth_steps or 0)
        check_optimizer(run.optimizer, "recycle_steps", self.schedule.every)
        check_can_reset(run.optimizer, settings.optimizer_state, run.table.blocks)
        check_can_fold(settings.fold, [self.table.blocks[index] for index in self._layers], "recycle_fold")
        wanted = needs_of_settings(settings)
        self.probe = (
            Probe(run, resolved(settings.seed), settings.probe_batches, wanted, "recycling") if wanted else None
        )
        self._gradients_scaled = self._state_checked = self._said_left_alone = False
        self._check_weights()
        self._check_initial_distribution()
        if self.smooth_steps:
            self._hooks = hook_gradients(self.table, self.smooth_steps)
            resume_fade_ins(self.table, self.smooth_steps)
        self._warn_about_settings()
        if run.step > 0 and self.table.phases == 0 and len(self.schedule.phases_until(run.step)):
            logger.warning(
                f"Recycling starts at step {run.step} of a resumed run without recycling state: "
                "every neuron counts as never recycled."
            )

    @property
    def _layers(self) -> list[int]:
        """Indices of the blocks that take part."""
        return list(
            range(len(self.table.blocks)) if self.settings.layers is None else sorted(set(self.settings.layers))
        )

    def _check_weights(self) -> None:
        blocks = [self.table.blocks[index] for index in self._layers]
        if not any(map(self.run.is_trained, blocks)):
            raise ValueError(
                f"recycle_steps={self.settings.steps} has nothing to recycle: the weights of block "
                f"{blocks[0].name!r}{' and of all others' if len(blocks) > 1 else ''} are frozen, and new ones could "
                "never learn; train them, or turn recycling off."
            )
        # What such a reinitialization looks at would be the weights that are still fading in.
        overlap = self.smooth_steps > self.schedule.every and self.settings.reinit != "initial"
        if overlap and any(block.out_slice.storage.separate_masters for block in blocks):
            raise ValueError(
                f"recycle_reinit={self.settings.reinit!r} can't be used under DeepSpeed with recycle_smooth_steps="
                f"{self.smooth_steps}, longer than the {self.schedule.every} steps between phases: shorten it, or "
                "use recycle_reinit='initial'."
            )

    def _check_initial_distribution(self) -> None:
        # What can't be drawn is said now rather than at the first phase.
        for index in self._layers:
            view = self.table.views[index]
            inner = [piece.role for piece in view.block.slices if piece.role != "out"]
            drawn: dict[str, list[str] | None] = {
                "initial": None,
                "matched_normal": view.bias_roles,
                "zero_out": inner,
                "gradmax": inner,
                "sample": inner,
            }
            roles = drawn.get(self.settings.reinit, [])
            view.sample_initial(1, generator_for(0, 0, index, "check"), roles)

    def _warn_about_settings(self) -> None:
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
                "neurons that still fade in are not eligible in the next phase."
            )

    def acting_steps(self, max_steps: int) -> range:
        return make_schedule(self.settings, max_steps).phases_until(max_steps)

    def before_clipping(self) -> None:
        if self.smooth_steps and not self._gradients_scaled:
            scale_gradients(self.table, self.smooth_steps)
            self._gradients_scaled = True

    def before_step(self) -> None:
        if self.smooth_steps:
            self.before_clipping()  # nobody could before, on a stock Trainer
            restore_new_weights(self.table)

    def after_optimizer_step(self, stepped: bool) -> None:
        if self.smooth_steps:
            self._gradients_scaled = False
            blend_weights(self.table, self.smooth_steps, advance=stepped)
        if stepped and not self._state_checked:
            # Optimizers make their state at the first step; what is unknown in it is said now, not at the first phase.
            check_state(self.run.optimizer, self.table.blocks, self.settings.optimizer_state)
            self._state_checked = True

    def after_step(self, info: StepInfo) -> None:
        if not info.stepped or info.step >= info.max_steps or not self.schedule.is_phase(info.optimizer_steps):
            return
        reset_before = self.table.optimizer_entries_reset
        records = run_phase(
            self.table,
            self.settings,
            self.schedule,
            info.step,
            smooth_steps=self.smooth_steps,
            optimizer=self.run.optimizer,
            loss_is_finite=info.loss_is_finite(),
            frozen=self.run.frozen(),
            gather=None if self.probe is None else self.probe.noting(info.step),
        )
        for record in records:
            self.run.recorder.phase(record)
        recycled = {record.block for record in records if record.chosen}
        if recycled and self.settings.optimizer_state != "keep":
            count = self.table.optimizer_entries_reset - reset_before
            check_was_reset(self.run.optimizer, [b for b in self.table.blocks if b.name in recycled], count)
            logger.info(f"Step {info.step}: {count} entries of the optimizer's state were reset.")
        for note in {record.note for record in records if record.note}:
            if not (note.startswith(LEFT_ALONE) and self._said_left_alone):
                logger.warning(f"Step {info.step}: {note}.")
            self._said_left_alone |= note.startswith(LEFT_ALONE)

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def scalars(self) -> dict[str, float]:
        """Recycling events and entries of the optimizer's state that were reset so far, share of neurons ever recycled,
        neurons that fade in and immune neurons."""
        if not self.has_started:
            return {}
        counts = list(self.table.counts.values())
        return {
            "neurons_recycled": sum(int(block.sum()) for block in counts),
            "neurons_ever_recycled_share": sum(int((block > 0).sum()) for block in counts) / sum(map(len, counts)),
            "neurons_fading_in": self.table.fading_in,
            "neurons_immune": self.immune(self.table),
            "optimizer_entries_reset": self.table.optimizer_entries_reset,
        }

    def immune(self, table: NeuronTable) -> int:
        """Neurons that the next phase may not select because of their immunity."""
        phase = table.phases + 1
        return sum(int(is_immune(s.last_phase, phase, self.settings.immunity).sum()) for s in table.states)


class RecyclingCallback(NeuronCallback):
    """Neuron recycling: every `steps` optimizer steps, the least important FF neurons get new weights.

    Source: *Neuron Recycling*, section "Recycling".

    Steps that the optimizer skips, because a gradient scaler found an overflow, do not count: everything happens as if
    their batches had never been. The history notes the Trainer's steps, which do count them.

    Blocks whose weights are frozen at a phase, as in gradual unfreezing, are left out of it, which is recorded.

    Takes the settings of `RecyclingArguments` whose names begin with `recycle_`, without that prefix:
    `RecyclingCallback(steps=1000, fraction=0.1, immunity=2)`.

    On a stock `Trainer` it works with these limits, which `RecyclingTrainer` does not have: a resumed run has forgotten
    which neurons were recycled, immune or fading in (it says so), nothing is saved with checkpoints, and with
    `smooth_steps` the gradients of fading-in neurons are scaled after gradients were clipped instead of before, so that
    the clipping norm counts them in full (no difference without clipping).
    """

    method_class = Recycling


def make_schedule(settings: RecyclingSettings, max_steps: int) -> PhaseSchedule:
    """The phases of a training of `max_steps` steps.

    Args:
        settings: resolved.

    Raises:
        ValueError: if recycling starts after it ends.
    """
    start, end = resolved(settings.start or 0), max_steps if settings.end is None else resolved(settings.end)
    if start > end:
        raise ValueError(f"recycle_start={start} is after recycle_end={end}: recycling would never happen.")
    return PhaseSchedule(resolved(settings.steps), start, end, max_steps, settings.fraction, settings.fraction_schedule)
