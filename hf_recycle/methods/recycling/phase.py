"""One selection phase: choose neurons, give them new weights, note what was done."""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from hf_recycle.engines.replica_checksum import ReplicaChecksum
from hf_recycle.methods.folding import FOLDED, fold
from hf_recycle.methods.probe import Gather, Statistics
from hf_recycle.methods.recycling.births import REINITIALIZATIONS, Options
from hf_recycle.methods.recycling.fade_in import begin
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, is_immune, select_globally, select_in_each
from hf_recycle.methods.registry import FOLDS, needs_of
from hf_recycle.methods.schedule import PhaseSchedule, resolved
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.blocks import magnitudes_of
from hf_recycle.neurons.magnitudes import on_cpu
from hf_recycle.neurons.optimizer_state import reset_state
from hf_recycle.neurons.table import BlockState, NeuronTable
from hf_recycle.records.recorder import LEFT_ALONE, SKIPPED, BlockRecord
from hf_recycle.utils.seeds import generator_for


def needs_of_settings(settings: RecyclingSettings) -> dict[str, str]:
    """The statistics that phases look at, each with the argument that asks for it."""
    asked = {
        "recycle_reinit": (settings.reinit, needs_of(REINITIALIZATIONS[settings.reinit])),
        "recycle_fold": (settings.fold, FOLDS[settings.fold]),
        "recycle_selection": (settings.selection, needs_of(CRITERIA[settings.selection])),
    }
    return {name: f"{field}={value!r}" for field, (value, names) in asked.items() for name in sorted(names)}


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
    gather: Gather | None = None,
) -> list[BlockRecord]:
    """Runs the selection phase right after step `step` of the Trainer.

    A non-finite loss, magnitude or statistic skips the whole phase: nothing is written, and the records say why. A
    skipped phase does not count for immunity.

    Args:
        settings: validated settings, with a seed.
        smooth_steps: steps over which new weights fade in; 0: they are written at once.
        optimizer: whose state is reset; None: none.
        loss_is_finite: whether the loss of the whole batch was.
        frozen: indices of blocks that are not trained now. The phase leaves them out, which their records say.
        gather: gives the statistics of blocks, see `Probe.gather`; for settings that need some.

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
    states = [table.states[block_index] for block_index in block_indices]
    eligible = _eligible(states, phase, optimizer_steps, settings)

    reason = _reason_to_skip(magnitudes, loss_is_finite)
    names = needs_of_settings(settings)
    statistics: list[Statistics] = [{} for _ in block_indices]
    limits = quotas if settings.scope == "layer" else quotas * len(block_indices)
    if names and not reason:
        assert gather is not None, f"{', '.join(names)} can't be known without a probe"
        statistics = gather(block_indices, names, optimizer_steps, max(limits))
        if not all(value.isfinite().all() for each in statistics for value in each.values()):
            reason = f"{SKIPPED}some statistics of the extra batches are not finite"
    if reason:
        requested = quotas
        if settings.scope == "global":
            requested, reason = [0] * len(block_indices), f"{reason} ({quotas[0]} requested over all blocks)"
        return left_out + [
            BlockRecord(step, table.blocks[number].name, request, int(mask.count_nonzero()), [], reason, phase=phase)
            for number, request, mask in zip(block_indices, requested, eligible, strict=True)
        ]

    # The last block last: if activations are multiplied with each other, which is known of one block at a time, that is
    # where the folds begin.
    scores = [
        CRITERIA[settings.selection](
            Signals(
                values,
                partial(generator_for, resolved(settings.seed), optimizer_steps, block_index, "select"),
                table.blocks[block_index].out_columns,
                known,
                mask,
                limit,
            )
        )
        for block_index, values, known, mask, limit in zip(
            block_indices, magnitudes, statistics, eligible, limits, strict=True
        )
    ]
    refused = [""] * len(block_indices)
    if settings.threshold is not None:
        refused, quotas = _apply_threshold(settings, settings.threshold, scores, eligible, states, quotas)
    if settings.scope == "global":
        chosen = select_globally(scores, eligible, quotas[0])
        found = sum(len(index) for index in chosen)
        shortfall = found < quotas[0]
        note = f"{found} of {quotas[0]} requested over all blocks: too few eligible neurons" if shortfall else ""
        requested, notes = [len(index) for index in chosen], [each or note for each in refused]
    else:
        chosen = select_in_each(scores, eligible, quotas)
        requested = quotas
        short = ["too few eligible neurons" if len(c) < q else "" for c, q in zip(chosen, quotas, strict=True)]
        notes = [each or note for each, note in zip(refused, short, strict=True)]

    if settings.reinit == "split":
        for place, (index, state) in enumerate(zip(chosen, states, strict=True)):
            if len(index) > (sources := len(_others(state, index))):
                notes[place] = f"split has {sources} neurons to share with {len(index)} newborns"
                chosen[place] = index[:0]

    table.phases = phase
    checksum = ReplicaChecksum()
    checksum.note(chosen)
    generators = [
        generator_for(resolved(settings.seed), optimizer_steps, block_index, "reinit") for block_index in block_indices
    ]
    # One block at a time: every process draws the new weights of all recycled neurons, whatever its share of the model.
    # The last one first, because it was read last and may still be in a cache.
    for block_index, index, generator, known in reversed(
        list(zip(block_indices, chosen, generators, statistics, strict=True))
    ):
        checksum.note(_recycle(table, block_index, index, settings, generator, smooth_steps, optimizer, known))
    for block_index, index in zip(block_indices, chosen, strict=True):
        table.states[block_index].note(index, phase, step, table.skipped_steps)
    checksum.check(f"the neurons recycled at step {step}", table.blocks[block_indices[0]].out_slice.device)
    edits = [FOLDED[settings.fold] if len(index) else "" for index in chosen]
    columns = block_indices, requested, eligible, chosen, notes, edits
    return left_out + [
        BlockRecord(
            step, table.blocks[number].name, request, int(mask.count_nonzero()), index.tolist(), note, edit, phase
        )
        for number, request, mask, index, note, edit in zip(*columns, strict=True)
    ]


def _left_out(table: NeuronTable, block_indices: list[int], step: int, nothing: bool) -> list[BlockRecord]:
    """Records of blocks that the next phase leaves out; a phase that has `nothing` else is skipped."""
    note = f"{SKIPPED if nothing else ''}the weights of some blocks are frozen"
    phase = table.phases + 1
    return [BlockRecord(step, table.blocks[number].name, 0, 0, [], note, phase=phase) for number in block_indices]


def _eligible(states: list[BlockState], phase: int, optimizer_steps: int, settings: RecyclingSettings) -> list[Tensor]:
    """Which neurons may be chosen, bool `(d_ff,)` for each block."""
    excluded = torch.cat([state.pruned for state in states])
    last_phase = torch.cat([state.last_phase for state in states])
    if settings.immunity:
        excluded |= is_immune(last_phase, phase, settings.immunity)
    if settings.maturity:
        born = torch.cat([state.last_step - state.skipped_steps for state in states])
        excluded |= (optimizer_steps - born < settings.maturity) & (last_phase > 0)
    eligible = list((~excluded).split([state.num_neurons for state in states]))
    for mask, state in zip(eligible, states, strict=True):
        if state.fade_in is not None:
            mask[state.fade_in.index] = False
    return eligible


def _others(state: BlockState, index: Tensor) -> Tensor:
    """Indices of the neurons that are neither reborn now, nor pruned or fading in."""
    others = ~(state.pruned | state.fading_in())
    others[index] = False
    return others.nonzero().flatten()


def _apply_threshold(
    settings: RecyclingSettings,
    threshold: float,
    scores: list[Tensor],
    eligible: list[Tensor],
    states: list[BlockState],
    quotas: list[int],
) -> tuple[list[str], list[int]]:
    """Takes those above the threshold out of `eligible`, and lowers what is requested to what is left; also, for each
    block, why none of it may be recycled, or empty."""
    refused, healthy = [], _healthy(settings, threshold, scores, states)
    for values, mask, state in zip(scores, eligible, states, strict=True):
        below = values <= threshold
        takes_all = bool((below | state.pruned).all())
        every = f"the threshold {threshold:g} would take every neuron of a layer" if takes_all else ""
        refused.append(healthy or every)
        mask &= below & (not refused[-1])
    left = [int(mask.count_nonzero()) for mask in eligible]
    if settings.scope == "global":
        left = [sum(left)]
    return refused, [min(*pair) for pair in zip(quotas, left, strict=True)]


def _healthy(settings: RecyclingSettings, threshold: float, scores: list[Tensor], states: list[BlockState]) -> str:
    """Why a model of which nothing was recycled yet is left alone, or empty."""
    if not settings.min_share or any(state.counts.any() for state in states):
        return ""
    standing = ~torch.cat([state.pruned for state in states])
    below = (torch.cat(scores) <= threshold) & standing
    share = int(below.sum()) / max(int(standing.sum()), 1)
    if share >= settings.min_share:
        return ""
    return (
        f"{LEFT_ALONE}{100 * share:.1f}% of the neurons are at or below recycle_threshold={threshold:g}, fewer than "
        f"recycle_min_share={settings.min_share:g}"
    )


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
    statistics: Statistics,
) -> list[Tensor]:
    """Gives neurons `index` of one block new weights, at once or as a fade-in, and returns what was written."""
    if not len(index):
        return []
    block, state = table.blocks[block_index], table.states[block_index]
    others = _others(state, index)
    folded = fold(settings.fold, block, statistics, index, others)
    options = Options(settings.noise_scale, others, statistics)
    birth = REINITIALIZATIONS[settings.reinit](table.views[block_index], index, generator, options)
    if optimizer is not None and settings.optimizer_state != "keep":
        table.optimizer_entries_reset += reset_state(optimizer, block, index, settings.optimizer_state)
    changed, values = birth.together(index)
    if smooth_steps:
        begin(block, state, changed, values)
    else:
        block.write(changed, values)
    return [*folded, *values.values()]
