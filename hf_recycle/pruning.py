"""Prunes neurons: chooses them, sets them to zero for good, notes what was done."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

import torch

from hf_recycle.agreement import check_agreement
from hf_recycle.methods.pruning import PruningSchedule
from hf_recycle.methods.seeds import generator_for
from hf_recycle.methods.selection import CRITERIA, Signals, select
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.settings import PruningSettings


@dataclass(frozen=True)
class PruningRecord:
    """What one pruning did in one block.

    Attributes:
        step: optimizer step.
        block: name of the block.
        requested: neurons to be pruned now, beyond those that were.
        eligible: neurons not pruned before.
        pruned: indices of the neurons pruned now, ascending.
        note: why fewer were pruned than requested, or empty.
    """

    step: int
    block: str
    requested: int
    eligible: int
    pruned: list[int]
    note: str = ""


@torch.no_grad()
def prune(
    table: NeuronTable,
    settings: PruningSettings,
    schedule: PruningSchedule,
    step: int,
    frozen: Collection[int] = (),
) -> list[PruningRecord]:
    """Prunes each layer to the share that is due right after optimizer step `step`.

    A pruned neuron's weights and biases are zero; `hold_at_zero` keeps them so. One in transition leaves it.
    A layer that is frozen, or has magnitudes that are not finite, waits for the next pruning.

    Args:
        settings: validated settings, with a seed.
        frozen: indices of the blocks that are not trained now.

    Returns:
        One record for each block.
    """
    records, chosen = [], []
    # Of what the model computes with, also for neurons in transition, which pruning may take.
    magnitudes = table.magnitudes()
    for position, (block, state) in enumerate(zip(table.blocks, table.states, strict=True)):
        eligible = ~state.pruned
        requested = max(schedule.target(step, block.num_neurons) - int(state.pruned.sum()), 0)
        record = PruningRecord(step, block.name, requested, int(eligible.sum()), [])
        reason = "its weights are frozen" if position in frozen else ""
        if not reason and not magnitudes[block.name].isfinite().all():
            reason = "some magnitudes are not finite"
        if reason:
            records.append(replace(record, note=f"put off: {reason}"))
            continue
        signals = Signals(magnitudes[block.name], partial(generator_for, settings.seed, step, position, "prune"))
        index = select(CRITERIA[settings.selection](signals), eligible, requested)
        state.pruned[index] = True
        if state.transition is not None:
            state.transition = state.transition.only(block, ~state.pruned[state.transition.index])
        block.switch_off(index)
        chosen.append(index)
        records.append(replace(record, pruned=index.tolist()))
    check_agreement(chosen, f"the neurons pruned at step {step}", table.blocks[0].out_slice.device)
    return records


@torch.no_grad()
def hold_at_zero(table: NeuronTable) -> None:
    """Sets pruned neurons to zero again, whatever the optimizer did to them."""
    for block, state in zip(table.blocks, table.states, strict=True):
        if state.pruned.any():
            block.switch_off(state.pruned.nonzero().flatten())
