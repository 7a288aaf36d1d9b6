"""One selection phase: choose neurons, give them new weights, note what was done."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_recycle.engines.replica_checksum import Agreement
from hf_recycle.methods.recycling.births import REINITIALIZATIONS, Options
from hf_recycle.methods.recycling.fade_in import begin
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, is_immune, select_globally, select_in_each
from hf_recycle.methods.schedule import PhaseSchedule
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.blocks import magnitudes_of
from hf_recycle.neurons.magnitudes import on_cpu
from hf_recycle.neurons.optimizer_state import reset_state
from hf_recycle.neurons.table import BlockState, NeuronTable
from hf_recycle.records.recorder import SKIPPED
from hf_recycle.utils.seeds import generator_for


@dataclass(frozen=True)
class PhaseRecord:
    """What a phase did in one block.

    Attributes:
        step: of the Trainer.
        phase: number of the phase, from 1 (of a skipped phase: the number it would have had).
        block: name of the block.
        requested: neurons that the settings ask for, also of a skipped phase (in global scope: those of this block
            that were chosen).
        eligible: neurons that could be chosen.
        recycled: indices of the chosen neurons, ascending.
        note: why fewer were recycled than requested, or empty.
    """

    step: int
    phase: int
    block: str
    requested: int
    eligible: int
    recycled: list[int]
    note: str = ""


@torch.no_grad()
def run_phase(
    table: NeuronTable,
    settings: RecyclingSettings,
    schedule: PhaseSchedule,
    step: int,
    *,
    smooth_steps: int,
    optimizer=None,
    loss_is_finite: bool = True,
    frozen: Collection[int] = (),
) -> list[PhaseRecord]:
    """Runs the selection phase right after step `step` of the Trainer.

    A non-finite loss or magnitude skips the whole phase: nothing is written, and the records say why. A skipped phase
    does not count for immunity.

    Args:
        settings: validated settings, with a seed.
        smooth_steps: steps over which new weights fade in; 0: they are written at once.
        optimizer: whose state is reset; None: none.
        loss_is_finite: whether the loss of the whole batch was.
        frozen: indices of blocks that are not trained now. The phase leaves them out, which their records say.

    Returns:
        One record for each block that takes part or is left out.
    """
    asked = range(len(table.blocks)) if settings.layers is None else sorted(set(settings.layers))
    positions = [position for position in asked if position not in frozen]
    left_out = _left_out(table, [position for position in asked if position in frozen], step, nothing=not positions)
    if not positions:
        return left_out
    magnitudes = on_cpu(magnitudes_of([table.blocks[position] for position in positions]))
    phase, taken = table.phases + 1, table.optimizer_steps(step)
    if settings.scope == "global":
        quotas = [schedule.quota(taken, sum(len(values) for values in magnitudes))]
    else:
        by_size = {size: schedule.quota(taken, size) for size in {len(values) for values in magnitudes}}
        quotas = [by_size[len(values)] for values in magnitudes]
    eligible = _eligible([table.states[position] for position in positions], phase, settings.immunity)

    reason = _reason_to_skip(magnitudes, loss_is_finite)
    if reason:
        requested = quotas
        if settings.scope == "global":
            requested, reason = [0] * len(positions), f"{reason} ({quotas[0]} requested over all blocks)"
        return left_out + [
            PhaseRecord(step, phase, table.blocks[position].name, request, int(mask.count_nonzero()), [], reason)
            for position, request, mask in zip(positions, requested, eligible, strict=True)
        ]

    scores = [
        CRITERIA[settings.selection](Signals(values, partial(generator_for, settings.seed, taken, position, "select")))
        for position, values in zip(positions, magnitudes, strict=True)
    ]
    if settings.scope == "global":
        chosen = select_globally(scores, eligible, quotas[0])
        found = sum(len(index) for index in chosen)
        shortfall = found < quotas[0]
        note = f"{found} of {quotas[0]} requested over all blocks: too few eligible neurons" if shortfall else ""
        requested, notes = [len(index) for index in chosen], [note] * len(chosen)
    else:
        chosen = select_in_each(scores, eligible, quotas)
        requested = quotas
        notes = ["too few eligible neurons" if len(c) < q else "" for c, q in zip(chosen, quotas, strict=True)]

    table.phases = phase
    agreement = Agreement()
    agreement.note(chosen)
    generators = [generator_for(settings.seed, taken, position, "reinit") for position in positions]
    # One block at a time: every process draws the new weights of all recycled neurons, whatever its share of the model.
    # The last one first, because it was read last and may still be in a cache.
    for position, index, generator in reversed(list(zip(positions, chosen, generators, strict=True))):
        agreement.note(_recycle(table, position, index, settings, generator, smooth_steps, optimizer))
    for position, index in zip(positions, chosen, strict=True):
        table.states[position].note(index, phase, step)
    agreement.check(f"the neurons recycled at step {step}", table.blocks[positions[0]].out_slice.device)
    return left_out + [
        PhaseRecord(step, phase, table.blocks[position].name, request, int(mask.count_nonzero()), index.tolist(), note)
        for position, request, mask, index, note in zip(positions, requested, eligible, chosen, notes, strict=True)
    ]


def _left_out(table: NeuronTable, positions: list[int], step: int, nothing: bool) -> list[PhaseRecord]:
    """Records of blocks that the next phase leaves out; a phase that has `nothing` else is skipped."""
    note = f"{SKIPPED if nothing else ''}the weights of some blocks are frozen"
    phase = table.phases + 1
    return [PhaseRecord(step, phase, table.blocks[position].name, 0, 0, [], note) for position in positions]


def _eligible(states: list[BlockState], phase: int, immunity: int) -> list[Tensor]:
    """Which neurons may be chosen, bool `(d_ff,)` for each block."""
    excluded = torch.cat([state.pruned for state in states])
    if immunity:
        excluded |= is_immune(torch.cat([state.last_phase for state in states]), phase, immunity)
    eligible = list((~excluded).split([state.num_neurons for state in states]))
    for mask, state in zip(eligible, states, strict=True):
        if state.transition is not None:
            mask[state.transition.index] = False
    return eligible


def _reason_to_skip(magnitudes: list[Tensor], loss_is_finite: bool) -> str:
    if not loss_is_finite:
        return f"{SKIPPED}the loss is not finite"
    # The largest is NaN if any is; none is negative.
    if not torch.cat(magnitudes).amax().isfinite():
        return f"{SKIPPED}some magnitudes are not finite"
    return ""


def _recycle(
    table: NeuronTable,
    position: int,
    index: Tensor,
    settings: RecyclingSettings,
    generator: torch.Generator,
    smooth_steps: int,
    optimizer,
) -> list[Tensor]:
    """Gives neurons `index` of one block new weights, at once or as a transition, and returns those."""
    if not len(index):
        return []
    block, state = table.blocks[position], table.states[position]
    options = Options(noise_scale=settings.noise_scale)
    values = REINITIALIZATIONS[settings.reinit](table.views[position], index, generator, options)
    if optimizer is not None and settings.optimizer_state != "keep":
        table.optimizer_entries_reset += reset_state(optimizer, block, index, settings.optimizer_state)
    if smooth_steps:
        begin(block, state, index, values)
    else:
        block.write(index, values)
    return list(values.values())
