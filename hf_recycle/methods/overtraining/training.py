"""Overtrains feed-forward neurons: trains them alone for some extra batches, notes what was done."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_recycle.engines.replica_checksum import compare_replicas, process_count
from hf_recycle.methods.isolated_training import isolated_training
from hf_recycle.methods.overtraining.subsets import choose, warm_up
from hf_recycle.methods.recycling.selection import others
from hf_recycle.methods.schedule import resolved
from hf_recycle.methods.settings import OvertrainingSettings
from hf_recycle.neurons.fresh_optimizer import fresh_optimizer
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.utils.seeds import generator_for


@dataclass(frozen=True)
class OvertrainingRecord:
    """What one overtraining did.

    Attributes:
        neurons: neurons trained, over all blocks.
        learning_rate: the highest, after the warm-up.
        losses: of each batch before its step, float32 `(batches,)` on the device, of this process.
        skipped: batches whose gradient was not finite, which changed nothing.
    """

    neurons: int
    learning_rate: float
    losses: Tensor
    skipped: int


def overtrain(
    table: NeuronTable,
    settings: OvertrainingSettings,
    step: int,
    *,
    model: nn.Module,
    optimizer,
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    max_grad_norm: float,
    device: torch.device,
    process: int,
    frozen: Collection[int] = (),
) -> OvertrainingRecord | None:
    """Trains the chosen neurons on `settings.batches` batches, one optimizer step each, everything else frozen: other
    neurons and the out-projections' biases stay as they are to the bit.

    Args:
        settings: validated settings, with a seed.
        step: optimizer step of the main run.
        model: computes without a wrapper that reduces gradients, or is an FSDP2 model.
        optimizer: the main one, wrapped or not; it is looked at only.
        batches: of this process.
        loss_of: the loss of a batch, to be averaged over processes.
        max_grad_norm: gradients, of the chosen neurons alone, are clipped to this norm; 0: not clipped.
        process: number of this process.
        frozen: indices of the blocks that are not trained now, and stay as they are.

    Returns:
        None if nothing was done: no neuron is left to train, or the learning rate is 0.
    """
    chosen = _choose(table, settings, step, frozen, device)
    neurons = sum(map(len, chosen))
    if not neurons:
        return None
    blocks = (block for block_index, block in enumerate(table.blocks) if block_index not in frozen)
    fresh = fresh_optimizer(optimizer, (parameter for block in blocks for parameter in block.parameters()))
    rates = [group["lr"] for group in fresh.param_groups]
    if not any(rates):
        return None
    trained = [parameter for group in fresh.param_groups for parameter in group["params"]]
    bystanders = _Bystanders(table, chosen)
    scaler = getattr(optimizer, "scaler", None)
    scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
    losses, skipped = [], 0
    seed = generator_for(resolved(settings.seed), step, process, "overtrain dropout").initial_seed()
    with isolated_training(model, trained, device, seed):
        for number, batch in enumerate(batches, start=1):
            loss = loss_of(model, batch)
            losses.append(loss.detach().float())
            (loss * scale).backward()
            reduce_gradients(trained, scale)
            bystanders.clear_gradients()
            norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if norm.isfinite():
                for group, rate in zip(fresh.param_groups, rates, strict=True):
                    group["lr"] = rate * warm_up(number, settings.batches)
                fresh.step()
                bystanders.put_back()
            else:
                skipped += 1
                scale = max(scale / 2, 1.0)  # what a gradient scaler does about an overflow
            model.zero_grad(set_to_none=True)
    return OvertrainingRecord(neurons, max(rates), torch.stack(losses), skipped)


def _choose(
    table: NeuronTable, settings: OvertrainingSettings, step: int, frozen: Collection[int], device: torch.device
) -> list[Tensor]:
    """The neurons to train, for each block."""
    magnitudes = table.magnitudes()
    chosen = [
        choose(
            magnitudes[block.name],
            ~(state.pruned | state.fading_in()) & (block_index not in frozen),
            settings.subset,
            settings.fraction,
            partial(generator_for, resolved(settings.seed), step, block_index, "overtrain subset"),
        )
        for block_index, (block, state) in enumerate(zip(table.blocks, table.states, strict=True))
    ]
    compare_replicas(chosen, f"the neurons overtrained at step {step}", device)
    return chosen


class _Bystanders:
    """The neurons that are not trained: they lie in the same parameters as those that are."""

    def __init__(self, table: NeuronTable, chosen: list[Tensor]):
        self._kept = []
        for block, index in zip(table.blocks, chosen, strict=True):
            rest = others(block.num_neurons, index)
            if len(rest):
                self._kept += [(piece, rest, piece.storage.read(piece, rest)) for piece in block.slices]

    def clear_gradients(self) -> None:
        for piece, rest, _ in self._kept:
            piece.storage.fill(piece.storage.gradient_tiles(piece), rest, 0.0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undoes what an optimizer does without a gradient, such as weight decay."""
        for piece, rest, values in self._kept:
            piece.storage.write(piece, rest, values)


@torch.no_grad()
def reduce_gradients(parameters: list[nn.Parameter], scale: float) -> None:
    """Averages gradients over processes where no engine has done so, and takes the loss scale out of them."""
    processes = process_count()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # every process has to take part
        if processes > 1 and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(processes)
        if scale != 1:
            parameter.grad.div_(scale)
