"""The probe: what feed-forward neurons do on some extra batches, and what the loss makes of it.

The batches run through the current weights in eval mode, and the training goes on as if nothing had happened. What is
gathered is a pure function of (weights, seed, optimizer step): there is nothing to save, and a resumed run gathers the
same.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_recycle.engines.replica_checksum import process_count
from hf_recycle.methods.activity import Activity
from hf_recycle.methods.base import LossOf, Run
from hf_recycle.methods.isolated_training import isolated_training
from hf_recycle.methods.overtraining.callback import extra_batches_of, model_loss
from hf_recycle.methods.overtraining.training import reduce_gradients
from hf_recycle.methods.registry import GRADIENTS
from hf_recycle.methods.token_draw import TokenDraw, losses_of_tokens
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.utils.seeds import generator_for

Statistics = dict[str, Tensor]
"""What is known of one block, by a name of `registry.STATISTICS`: float64 on the CPU; "cross_moment", "descent" and
"token_inputs" float32 on the block's device."""

Gather = Callable[[Sequence[int], Collection[str], int, int], list[Statistics]]
"""What `Probe.gather` does."""


class Probe:
    """Gathers statistics in one training.

    Args:
        run: the training.
        seed: of the extra batches.
        batches: extra batches each time, `per_device_train_batch_size` samples on each process.
        wanted: what to gather, and for which argument: `{statistic: argument}`.
        purpose: what for; those of one purpose share their extra batches.

    Raises:
        ValueError: for what can't be gathered in this training.
    """

    def __init__(self, run: Run, seed: int, batches: int, wanted: Mapping[str, str], purpose: str):
        self._run, self._seed, self._batches = run, seed, batches
        check_can_gather(wanted, run.table.blocks)
        # An order and masks of its own, also where overtraining has the same seed.
        own = generator_for(seed, 0, 0, f"probe for {purpose}").initial_seed()
        self._data = (run.extra_batches or extra_batches_of(run.train_dataloader))(own, next(iter(wanted.values())))
        self._wanted = wanted
        if "token_inputs" in wanted:
            self._draw_tokens(range(len(run.table.blocks)), 1, 0)  # what can't be had is said now

    def noting(self, step: int) -> Gather:
        """`gather`, which also notes in the history what share of each block is dead or dormant, after step `step` of
        the Trainer."""

        def gather(
            blocks: Sequence[int], names: Collection[str], optimizer_steps: int, count: int = 1
        ) -> list[Statistics]:
            found = self.gather(blocks, names, optimizer_steps, count)
            table = self._run.table
            for index, statistics in zip(blocks, found, strict=True):
                mean_abs = statistics.get("mean_abs")
                if mean_abs is not None and mean_abs.isfinite().all():
                    activity = Activity.of(mean_abs, table.states[index].pruned)
                    self._run.recorder.activity(step, table.blocks[index].name, vars(activity))
            return found

        return gather

    def gather(self, blocks: Sequence[int], names: Collection[str], step: int, count: int = 1) -> list[Statistics]:
        """Statistics `names` of the blocks of index `blocks`, after optimizer step `step`; on every process the same.
        `count`: how many tokens are drawn for "token_inputs".

        To be called on every process. "mean_abs", by which dead neurons are told, comes with all that takes a pass: its
        sum is a hundredth of one. "cross_moment" is not computed before it is looked up, with the weights as they
        are then, and kept for one block at a time; its diagonal, "second_moment", comes with the rest, so that what is
        finite can be told.
        """
        run = self._run
        scaler = getattr(run.optimizer, "scaler", None) if not GRADIENTS.isdisjoint(names) else None
        at_blocks = set(names) - {"token_inputs"}
        found = gather_statistics(
            run.model,
            [run.table.blocks[index] for index in blocks],
            {*at_blocks, "mean_abs"} if at_blocks else at_blocks,
            lambda: (batch for _, batch in self._batches_of(step)),
            loss_of=run.loss_of or model_loss,
            device=run.args.device,
            seed=self._forward_seed(step),
            # The loss is the mean over processes.
            processes=run.args.world_size,
            scale=scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0,
            attached=run.attached,
        )
        if "token_inputs" in names:
            for values, inputs in zip(found, self._draw_tokens(blocks, count, step), strict=True):
                values["token_inputs"] = inputs
        return found

    def _draw_tokens(self, indices: Sequence[int], count: int, step: int) -> list[Tensor]:
        run, argument = self._run, self._wanted["token_inputs"]
        blocks = [run.table.blocks[index] for index in indices]
        draw = TokenDraw(blocks, max(count, 1), self._seed, step, argument)
        hooks = [
            block.in_slices[0].module.register_forward_pre_hook(_Hook(partial(draw.see, number)))
            for number, block in enumerate(blocks)
        ]
        with _looking(run.model, run.args.device, self._forward_seed(step), hooks):
            for first, batch in self._batches_of(step):
                losses = None if run.token_losses_of is None else run.token_losses_of(run.model, batch)
                draw.take(losses_of_tokens(run.model, batch, argument) if losses is None else losses, first)
        return draw.drawn()

    def _forward_seed(self, step: int) -> int:
        return generator_for(self._seed, step, 0, "probe dropout").initial_seed()

    def _batches_of(self, step: int) -> Iterator[tuple[int, Any]]:
        """The extra batches of one process at an optimizer step, each with the number of its first sample: the stream
        goes on as fast as training does."""
        size, processes = self._run.args.per_device_train_batch_size, self._run.args.world_size
        first = step * size * processes + self._run.args.process_index * size
        for number in range(self._batches):
            position = first + number * processes * size
            yield position, self._data.batch(position, size)


def gather_statistics(
    model: nn.Module,
    blocks: Sequence[FeedForward],
    names: Collection[str],
    batches: Callable[[], Iterable[Any]],
    *,
    loss_of: LossOf = model_loss,
    device: torch.device,
    seed: int = 0,
    processes: int = 1,
    scale: float = 1.0,
    attached: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Statistics]:
    """Statistics `names` of some blocks of a model on some batches, see `Probe.gather`.

    Args:
        batches: gives them, each time from the first; of one process its own.
        loss_of: for what takes a backward pass: the loss of a batch, to be averaged over `processes`.
        seed: of the random numbers that a forward pass may draw.
        scale: what the loss is multiplied with before the backward pass, and gradients are divided by.
        attached: within it the backward pass takes place, see `Run.attached`.
    """

    def run_batches(some: Sequence[FeedForward], wanted: Collection[str]) -> list[_Sums]:
        with_gradients = not GRADIENTS.isdisjoint(wanted)
        trained = [parameter for block in some for parameter in block.parameters()] if with_gradients else []
        factor = scale if with_gradients else 1.0
        sums = [_Sums(block, wanted) for block in some]
        hooks = [hook for each in sums for hook in each.register(factor * processes)]
        with attached() if with_gradients else nullcontext(), _looking(model, device, seed, hooks, trained):
            count = 0
            for batch in batches():
                for each in sums:
                    each.mask = _mask_of(model, batch)
                loss = loss_of(model, batch)
                if with_gradients:
                    (loss * factor).backward()
                count += 1
            if "in_gradient" in wanted:
                reduce_gradients(trained, factor)
                for each in sums:
                    each.note_in_gradient(count)
        _sum_over_processes(sums)
        return sums

    names = {*names, "second_moment"} if "cross_moment" in names else set(names)
    at_once = sorted(names - {"cross_moment"})
    found: list[Statistics] = [{} for _ in blocks]
    if at_once:
        found = [_finished(sums, names) for sums in run_batches(blocks, at_once)]
    if "cross_moment" not in names:
        return found
    last = _Last(lambda index: run_batches([blocks[index]], ["cross_moment"])[0].cross_moment())
    return [_WithCrossMoment(values, partial(last, number)) for number, values in enumerate(found)]


def check_can_gather(names: Mapping[str, str], blocks: Sequence[FeedForward]) -> None:
    """Refuses statistics that can't be gathered of some blocks.

    Args:
        names: `{statistic: the argument that asks for it}`.

    Raises:
        ValueError: for what can't be seen, or has no room.
    """
    for name, argument in names.items():
        for block in blocks:
            _check_block(block, name, argument)
    if "cross_moment" in names:
        largest = max(blocks, key=lambda block: block.num_neurons)
        # Of the moments in float64 there are three at a time: damped, factored or inverted, and room to do that.
        _square(largest.num_neurons, largest.out_slice.device, largest, times=1 + 2 * 3)


@contextmanager
def _looking(
    model: nn.Module, device: torch.device, seed: int, hooks: Sequence[Any], trained: Sequence[nn.Parameter] = ()
) -> Iterator[None]:
    """Within the context the model is in eval mode, with gradients for parameters `trained` alone; afterwards it is
    as it was, without the hooks."""
    try:
        with torch.set_grad_enabled(bool(trained)), isolated_training(model, trained, device, seed):
            model.eval()
            yield
    finally:
        for hook in hooks:
            hook.remove()
        _reshard(model)


class _Sums:
    """Sums over positions of what one block computes, float32 on its device.

    Attributes:
        mask: bool `(batch, sequence)`, which positions count; None: all.
    """

    def __init__(self, block: FeedForward, names: Collection[str]):
        self._block, self._names = block, names
        self.mask: Tensor | None = None
        device, d_ff = block.out_slice.device, block.num_neurons
        vectors = ["count"] * bool({"mean", "mean_abs", "second_moment", "cross_moment", "taylor"} & set(names))
        vectors += [name for name in ("mean", "mean_abs", "second_moment", "in_gradient") if name in names]
        if "taylor" in names:
            vectors += ["mean"] * ("mean" not in vectors) + ["g²", "g²h", "g²h²"]
        self.values = {name: torch.zeros(1 if name == "count" else d_ff, device=device) for name in vectors}
        if "cross_moment" in names:
            self.values["cross_moment"] = _square(d_ff, device, block)
        if "descent" in names:
            self.values["descent"] = _square(block.out_slice.width, device, block)
        self._input: Tensor | None = None

    def register(self, scale: float) -> list[Any]:
        """Hooks on the block's projections; they meet gradients that are `scale` times too large."""
        out = self._block.out_slice.module
        hooks = [out.register_forward_pre_hook(_Hook(partial(self._see_activations, scale)))]
        if "descent" in self._names:
            hooks.append(self._block.in_slices[0].module.register_forward_pre_hook(_Hook(self._see_input)))
            hooks.append(out.register_forward_hook(_Hook(partial(self._see_output, scale))))
        return hooks

    def _rows(self, values: Tensor, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Values at positions, float32 `(n, features)`, and which of them count."""
        values = values.detach().movedim(1, -1) if isinstance(module, nn.Conv1d | nn.Conv2d) else values.detach()
        rows, mask = values.flatten(0, -2).float(), self.mask
        fits = mask is not None and mask.shape == values.shape[:-1]
        return rows, mask.flatten().to(values.device) if mask is not None and fits else None

    @torch.no_grad()
    def _see_activations(self, scale: float, module: nn.Module, args: tuple) -> None:
        rows, mask = self._rows(args[0], module)
        if mask is not None:
            rows = rows * mask.unsqueeze(1)
        sums = self.values
        if "count" in sums:
            sums["count"] += len(rows) if mask is None else mask.sum()
        if "mean" in sums:
            sums["mean"] += rows.sum(0)
        if "mean_abs" in sums:
            sums["mean_abs"] += rows.abs().sum(0)
        if "second_moment" in sums:
            sums["second_moment"] += rows.square().sum(0)
        if "cross_moment" in sums:
            sums["cross_moment"].addmm_(rows.T, rows)
        if "g²" in sums and args[0].requires_grad:
            args[0].register_hook(partial(self._see_gradient, scale, module, rows))

    @torch.no_grad()
    def _see_gradient(self, scale: float, module: nn.Module, rows: Tensor, gradient: Tensor) -> None:
        squares = (self._rows(gradient, module)[0] / scale).square()
        self.values["g²"] += squares.sum(0)
        self.values["g²h"] += (squares * rows).sum(0)
        self.values["g²h²"] += (squares * rows.square()).sum(0)

    def _see_input(self, module: nn.Module, args: tuple) -> None:
        self._input = self._rows(args[0], module)[0]

    def _see_output(self, scale: float, module: nn.Module, args: tuple, output: Tensor) -> None:
        seen, self._input = self._input, None
        assert seen is not None, "the in-projection comes first"

        @torch.no_grad()
        def see_gradient(gradient: Tensor) -> None:
            self.values["descent"].addmm_((self._rows(gradient, module)[0] / scale).T, seen)

        output.register_hook(see_gradient)

    @torch.no_grad()
    def note_in_gradient(self, batches: int) -> None:
        """Reads the gradients of the in-rows, of all processes together."""
        total = self.values["in_gradient"]
        for piece in self._block.in_slices:
            row = torch.zeros_like(total)
            for tile in piece.storage.gradient_tiles(piece):
                row[tile.neurons] += tile.values.float().abs().sum(1)
            total += piece.storage.sum_over_processes(piece, row)
        # Every process has the same: their sum, which is to come, must be that.
        total /= sum(piece.width for piece in self._block.in_slices) * batches * process_count()

    def mean(self, name: str) -> Tensor:
        """The mean over positions; zero where the block was not computed."""
        return self.values[name].double().cpu() / self.values["count"].double().cpu().clamp(min=1)

    def cross_moment(self) -> Tensor:
        return self.values["cross_moment"] / self.values["count"].clamp(min=1)


class _Hook:
    """A hook that wants to see a block computed whole, see `hf_recycle.mlm.last_feed_forward`."""

    sees_all_positions = True

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)


class _Last:
    """Remembers the last answer of a function of one number."""

    def __init__(self, function: Callable[[int], Tensor]):
        self._function = function
        self._known: tuple[int, Tensor] | None = None

    def __call__(self, number: int) -> Tensor:
        if self._known is None or self._known[0] != number:
            self._known = None  # before the next one is computed: there may be no room for two
            self._known = number, self._function(number)
        return self._known[1]


class _WithCrossMoment(dict):
    """Statistics of a block whose "cross_moment" is computed when it is looked up."""

    def __init__(self, values: Statistics, cross_moment: Callable[[], Tensor]):
        super().__init__(values)
        self._cross_moment = cross_moment

    def __missing__(self, name: str) -> Tensor:
        if name != "cross_moment":
            raise KeyError(name)
        return self._cross_moment()


def _finished(sums: _Sums, names: Collection[str]) -> dict[str, Tensor]:
    found = {name: sums.mean(name) for name in ("mean", "mean_abs", "second_moment") if name in names}
    if "in_gradient" in names:
        found["in_gradient"] = sums.values["in_gradient"].double().cpu()
    if "descent" in names:
        found["descent"] = sums.values["descent"]
    if "taylor" in names:
        mean, squares, linear, quadratic = map(sums.mean, ("mean", "g²", "g²h", "g²h²"))
        found["taylor"] = (quadratic - 2 * mean * linear + mean.square() * squares).clamp(min=0)
    return found


def _sum_over_processes(sums: Sequence[_Sums]) -> None:
    """One sum for all vectors, and one for each matrix, in place, because there may be no room for two."""
    if process_count() == 1:
        return
    values = [value for each in sums for value in each.values.values()]
    vectors = [value for value in values if value.dim() == 1]
    total = torch.cat(vectors)
    dist.all_reduce(total)
    for value, summed in zip(vectors, total.split(list(map(len, vectors))), strict=True):
        value.copy_(summed)
    for value in values:
        if value.dim() == 2:
            dist.all_reduce(value)


def _square(size: int, device: torch.device, block: FeedForward, times: int = 1) -> Tensor:
    try:
        return torch.zeros(times * size, size, device=device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"there is no room on {device} for the {4 * times * size**2:,} bytes of the moments of {block.name}: "
            "choose a criterion and a fold that need none, such as flap with mean."
        ) from error


def _mask_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Which positions are no padding; None where that is not known (a decoder has other positions)."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    config = getattr(model, "config", None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or getattr(config, "is_encoder_decoder", False):
        return None
    return mask.bool()


def _reshard(model: nn.Module) -> None:
    """Under FSDP2 a forward pass without a backward pass may leave whole parameters behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_block(block: FeedForward, name: str, argument: str) -> None:
    if block.out_slice.expert is not None:
        raise ValueError(
            f"{argument} needs the activations of every block, and those of {block.name} can't be seen, because one "
            "function computes all experts: choose low_magnitude, high_magnitude or random, and no fold."
        )
    if name in GRADIENTS and block.out_slice.storage.separate_masters:
        raise ValueError(
            f"{argument} needs gradients, which DeepSpeed takes over: use DDP or FSDP2, or what looks at activations "
            "alone, such as dormant, contribution or obs."
        )
