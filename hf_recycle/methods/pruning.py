"""Pruning: how many neurons of a layer are set to zero after which optimizer step, and which; they stay zero.

Source: *Neuron Recycling*, section "Gradual FF pruning" (linear); Zhu & Gupta, *To prune, or not to prune* (2017),
for the cubic schedule. The share counts all neurons of a layer and is cumulative: linear from step 10k
to 80k, 20% of the final share are pruned at 24k.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from transformers.utils import logging

from hf_recycle.engines.replica_checksum import compare_replicas
from hf_recycle.methods.base import Method, Run, StepInfo
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.folding import FOLDED, check_can_fold, fold
from hf_recycle.methods.probe import Gather, Probe, Statistics
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, select
from hf_recycle.methods.registry import FOLDS, needs_of
from hf_recycle.methods.schedule import resolved
from hf_recycle.methods.settings import PruningSettings
from hf_recycle.neurons.optimizer_state import check_optimizer
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records.recorder import BlockRecord
from hf_recycle.utils.seeds import generator_for


@dataclass(frozen=True)
class PruningSchedule:
    """The course of pruning over one run.

    Pruning happens right after optimizer step t when `start <= t <= end` and `(t - start) % every == 0`, and at `end`
    itself, so that the final share is reached also if `every` does not divide the way there.

    Attributes:
        every: steps between prunings.
        start: the step at which the share begins to grow from 0; with `end == start` all is pruned at once.
        end: the step at which the final share is reached.
        fraction: final share of the neurons of each layer.
        shape: linear, or cubic (fast at first, then slower and slower).
    """

    every: int
    start: int
    end: int
    fraction: float
    shape: str = "linear"

    def is_due(self, step: int) -> bool:
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def target(self, step: int, neurons: int) -> int:
        """How many of a layer's `neurons` are pruned after `step`: the share, rounded down, exactly."""
        if step < self.start:
            return 0
        progress = Fraction(1)
        if step < self.end:
            progress = Fraction(step - self.start, self.end - self.start)
        if self.shape == "cubic":
            progress = 1 - (1 - progress) ** 3
        return math.floor(Fraction(str(self.fraction)) * progress * neurons)


def needs_of_settings(settings: PruningSettings) -> dict[str, str]:
    """The statistics that prunings look at, each with the argument that asks for it."""
    asked = {
        "prune_fold": (settings.fold, FOLDS[settings.fold]),
        "prune_selection": (settings.selection, needs_of(CRITERIA[settings.selection])),
    }
    return {name: f"{field}={value!r}" for field, (value, names) in asked.items() for name in sorted(names)}


@torch.no_grad()
def prune(
    table: NeuronTable,
    settings: PruningSettings,
    schedule: PruningSchedule,
    step: int,
    frozen: Collection[int] = (),
    gather: Gather | None = None,
) -> list[BlockRecord]:
    """Prunes each layer to the share that is due right after optimizer step `step`.

    A pruned neuron's weights and biases are zero; `hold_at_zero` keeps them so. One fading in leaves it, and is not
    folded. A layer that is frozen, or has magnitudes or statistics that are not finite, waits for the next pruning.

    Args:
        settings: validated settings, with a seed.
        frozen: indices of the blocks that are not trained now.
        gather: gives the statistics of blocks, see `Probe.gather`; for settings that need some. "cross_moment" is that
            of a layer whose predecessors have been pruned.

    Returns:
        One record for each block.
    """
    records, chosen = [], []
    names, trained = needs_of_settings(settings), [i for i in range(len(table.blocks)) if i not in frozen]
    known: dict[int, Statistics] = {}
    if names and trained:
        assert gather is not None, f"{', '.join(names)} can't be known without a probe"
        known = dict(zip(trained, gather(trained, names, step, 0), strict=True))
    # Of what the model computes with, also for neurons that fade in, which pruning may take.
    magnitudes = table.magnitudes()
    for block_index, (block, state) in enumerate(zip(table.blocks, table.states, strict=True)):
        eligible = ~state.pruned
        requested = max(schedule.target(step, block.num_neurons) - int(state.pruned.sum()), 0)
        record = BlockRecord(step, block.name, requested, int(eligible.sum()), [])
        reason = "its weights are frozen" if block_index in frozen else ""
        if not reason and not magnitudes[block.name].isfinite().all():
            reason = "some magnitudes are not finite"
        statistics = known.get(block_index, {})
        if not reason and not all(value.isfinite().all() for value in statistics.values()):
            reason = "some statistics of the extra batches are not finite"
        if reason:
            records.append(replace(record, note=f"put off: {reason}"))
            continue
        generator = partial(generator_for, resolved(settings.seed), step, block_index, "prune")
        signals = Signals(magnitudes[block.name], generator, block.out_columns, statistics, eligible, requested)
        index = select(CRITERIA[settings.selection](signals), eligible, requested)
        state.pruned[index] = True
        settled = ~state.fading_in()
        kept = (settled & ~state.pruned).nonzero().flatten()
        chosen += fold(settings.fold, block, statistics, index[settled[index]], kept)
        if state.fade_in is not None:
            state.fade_in = state.fade_in.only(block, ~state.pruned[state.fade_in.index])
        block.zero_(index)
        chosen.append(index)
        records.append(replace(record, chosen=index.tolist(), edits=FOLDED[settings.fold] if len(index) else ""))
    compare_replicas(chosen, f"the neurons pruned at step {step}", table.blocks[0].out_slice.device)
    return records


@torch.no_grad()
def hold_at_zero(table: NeuronTable) -> None:
    """Sets pruned neurons to zero again, whatever the optimizer did to them."""
    for block, state in zip(table.blocks, table.states, strict=True):
        if state.pruned.any():
            block.zero_(state.pruned.nonzero().flatten())


logger = logging.get_logger(__name__)


class Pruning(Method[PruningSettings]):
    """Prunes neurons by its schedule, and keeps them at zero."""

    settings_class = PruningSettings

    def start(self, run: Run, settings: PruningSettings) -> None:
        super().start(run, settings)
        check_optimizer(run.optimizer, "prune_fraction", settings.fraction)
        check_can_fold(settings.fold, run.table.blocks, "prune_fold")
        wanted = needs_of_settings(settings)
        self.probe = Probe(run, resolved(settings.seed), settings.probe_batches, wanted, "pruning") if wanted else None
        self.schedule = make_schedule(settings, run.max_steps)
        if self.schedule.is_due(0) and run.step == 0:
            self._prune(0, 0)

    def acting_steps(self, max_steps: int) -> list[int]:
        return list(filter(make_schedule(self.settings, max_steps).is_due, range(max_steps + 1)))

    def after_step(self, info: StepInfo) -> None:
        hold_at_zero(self.table)
        if info.step == info.max_steps and info.optimizer_steps < self.schedule.end <= info.max_steps:
            # Skipped steps have put it off until now.
            self._prune(info.step, self.schedule.end)
        elif info.stepped and self.schedule.is_due(info.optimizer_steps):
            self._prune(info.step, info.optimizer_steps)

    def _prune(self, step: int, progress: int) -> None:
        """Prunes, after the Trainer's step `step`, to the share of optimizer step `progress`."""
        gather = None if self.probe is None else self.probe.noting(step)
        records = prune(self.table, self.settings, self.schedule, progress, frozen=self.run.frozen(), gather=gather)
        for record in records:
            if record.requested or record.note:
                self.run.recorder.pruning(replace(record, step=step))
        for note in {record.note for record in records if record.note}:
            logger.warning(f"Pruning at step {step} {note}.")

    def scalars(self) -> dict[str, float]:
        """Share of the neurons that are pruned."""
        if not self.has_started:
            return {}
        pruned = list(self.table.pruned.values())
        return {"neurons_pruned_share": sum(int(block.sum()) for block in pruned) / sum(map(len, pruned))}


class PruningCallback(NeuronCallback):
    """Gradual pruning: a growing share of the FF neurons of each layer is set to zero, and stays zero.

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
    start, end = resolved(settings.start or 0), resolved(settings.end)
    if start > end:
        raise ValueError(f"prune_start={start} is after prune_end={end}: nothing would be pruned.")
    if end > max_steps:
        raise ValueError(
            f"prune_end={end} is after the last of {max_steps} steps: prune_fraction={settings.fraction} would not be "
            "reached; lower it or train longer."
        )
    return PruningSchedule(resolved(settings.steps), start, end, settings.fraction, settings.schedule)
