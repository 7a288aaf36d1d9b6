"""One selection phase: choose neurons, give them new weights, note what was done."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_recycle.engines.replica_checksum import ReplicaChecksum
from hf_recycle.methods.recycling.births import REINITIALIZATIONS, Options
from hf_recycle.methods.recycling.fade_in import begin
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, is_immune, select_globally, select_in_each
from hf_recycle.methods.schedule import PhaseSchedule, resolved
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
    block_indices = [block_index for block_index in asked if block_index not in frozen]
    left_out = _left_out(
        table, [block_index for block_index in asked if block_index in frozen], step, nothing=not block_indices
    )
    if not block_indices:
        return left_out
    magnitudes = on_cpu(magnitudes_of([table.blocks[block_index] for block_index in block_indices]))
    phase, optimizer_steps = table.phases + 1, table.optimizer_steps(step)
    if settings.scope == "global":
        quotas = [schedule.quota(optimizer_steps, sum(len(values) for values in magnitudes))]
    else:
        by_size = {size: schedule.quota(optimizer_steps, size) for size in {len(values) for values in magnitudes}}
        quotas = [by_size[len(values)] for values in magnitudes]
    eligible = _eligible([table.states[block_index] for block_index in block_indices], phase, settings.immunity)

    reason = _reason_to_skip(magnitudes, loss_is_finite)
    if reason:
        requested = quotas
        if settings.scope == "global":
            requested, reason = [0] * len(block_indices), f"{reason} ({quotas[0]} requested over all blocks)"
        return left_out + [
            PhaseRecord(step, phase, table.blocks[block_index].name, request, int(mask.count_nonzero()), [], reason)
            for block_index, request, mask in zip(block_indices, requested, eligible, strict=True)
        ]

    scores = [
        CRITERIA[settings.selection](
            Signals(values, partial(generator_for, resolved(settings.seed), optimizer_steps, block_index, "select"))
        )
        for block_index, values in zip(block_indices, magnitudes, strict=True)
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
    checksum = ReplicaChecksum()
    checksum.note(chosen)
    generators = [
        generator_for(resolved(settings.seed), optimizer_steps, block_index, "reinit") for block_index in block_indices
    ]
    # One block at a time: every process draws the new weights of all recycled neurons, whatever its share of the model.
    # The last one first, because it was read last and may still be in a cache.
    for block_index, index, generator in reversed(list(zip(block_indices, chosen, generators, strict=True))):
        checksum.note(_recycle(table, block_index, index, settings, generator, smooth_steps, optimizer))
    for block_index, index in zip(block_indices, chosen, strict=True):
        table.states[block_index].note(index, phase, step)
    checksum.check(f"the neurons recycled at step {step}", table.blocks[block_indices[0]].out_slice.device)
    return left_out + [
        PhaseRecord(
            step, phase, table.blocks[block_index].name, request, int(mask.count_nonzero()), index.tolist(), note
        )
        for block_index, request, mask, index, note in zip(
            block_indices, requested, eligible, chosen, notes, strict=True
        )
    ]


def _left_out(table: NeuronTable, block_indices: list[int], step: int, nothing: bool) -> list[PhaseRecord]:
    """Records of blocks that the next phase leaves out; a phase that has `nothing` else is skipped."""
    note = f"{SKIPPED if nothing else ''}the weights of some blocks are frozen"
    phase = table.phases + 1
    return [PhaseRecord(step, phase, table.blocks[block_index].name, 0, 0, [], note) for block_index in block_indices]


def _eligible(states: list[BlockState], phase: int, immunity: int) -> list[Tensor]:
    """Which neurons may be chosen, bool `(d_ff,)` for each block."""
    excluded = torch.cat([state.pruned for state in states])
    if immunity:
        excluded |= is_immune(torch.cat([state.last_phase for state in states]), phase, immunity)
    eligible = list((~excluded).split([state.num_neurons for state in states]))
    for mask, state in zip(eligible, states, strict=True):
        if state.fade_in is not None:
            mask[state.fade_in.index] = False
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
    block_index: int,
    index: Tensor,
    settings: RecyclingSettings,
    generator: torch.Generator,
    smooth_steps: int,
    optimizer,
) -> list[Tensor]:
    """Gives neurons `index` of one block new weights, at once or as a fade-in, and returns those."""
    if not len(index):
        return []
    block, state = table.blocks[block_index], table.states[block_index]
    options = Options(noise_scale=settings.noise_scale)
    values = REINITIALIZATIONS[settings.reinit](table.views[block_index], index, generator, options)
    if optimizer is not None and settings.optimizer_state != "keep":
        reset_state(optimizer, block, index, settings.optimizer_state)
    if smooth_steps:
        begin(block, state, index, values)
    else:
        block.write(index, values)
    return list(values.values())
