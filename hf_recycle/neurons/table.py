"""What is known of every neuron of one model: how often it was recycled, when last, whether it is fading in
or pruned."""

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_recycle.neurons.blocks import FeedForward, magnitudes_of
from hf_recycle.neurons.fading import FadeIn
from hf_recycle.neurons.find import survey
from hf_recycle.neurons.initial import FreshModules, InitialDistribution
from hf_recycle.neurons.left_out import summary
from hf_recycle.neurons.magnitudes import on_cpu
from hf_recycle.neurons.slices import full_shape

logger = logging.get_logger(__name__)


@dataclass
class BlockState:
    """The neurons of one block.

    Attributes:
        counts: int32 `(d_ff,)`, times recycled.
        last_phase: int32 `(d_ff,)`, number of the phase that recycled each last; 0: never.
        last_step: int64 `(d_ff,)`, step of the Trainer of that phase; 0: never.
        skipped_steps: int64 `(d_ff,)`, how many of the steps until then the optimizer had skipped.
        pruned: bool `(d_ff,)`, zeroed for good.
        fade-in: neurons that fade in, or None.
    """

    counts: Tensor
    last_phase: Tensor
    last_step: Tensor
    skipped_steps: Tensor
    pruned: Tensor
    fade_in: FadeIn | None = None

    @classmethod
    def fresh(cls, num_neurons: int) -> "BlockState":
        zeros = torch.zeros(num_neurons, dtype=torch.int32)
        return cls(zeros, zeros.clone(), zeros.to(torch.int64), zeros.to(torch.int64), zeros.bool())

    @property
    def num_neurons(self) -> int:
        return self.counts.shape[0]

    def note(self, index: Tensor, phase: int, step: int, skipped_steps: int) -> None:
        """Neurons `index` `(n,)` were recycled in phase number `phase`, after step `step` of the Trainer; the optimizer
        had skipped `skipped_steps` of them."""
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=self.counts.dtype))
        self.last_phase.index_fill_(0, index, phase)
        self.last_step.index_fill_(0, index, step)
        self.skipped_steps.index_fill_(0, index, skipped_steps)

    def fading_in(self) -> Tensor:
        """bool `(d_ff,)`."""
        mask = torch.zeros(self.num_neurons, dtype=torch.bool)
        if self.fade_in is not None:
            mask[self.fade_in.index] = True
        return mask


class BlockView:
    """A block as `hf_recycle.methods.recycling.births.Block` describes it: to look at, not to write to."""

    def __init__(self, model: nn.Module, block: FeedForward, fresh: FreshModules | None = None):
        self.block = block
        self.fresh = FreshModules(model) if fresh is None else fresh

    @cached_property
    def distribution(self) -> InitialDistribution:
        return InitialDistribution(self.fresh, self.block)

    @property
    def num_neurons(self) -> int:
        return self.block.num_neurons

    @property
    def is_dictionary(self) -> bool:
        mine = set(map(id, self.block.parameters()))
        return all(id(each) in mine or len(full_shape(each)) < 2 for each in self.fresh.model.parameters())

    @property
    def weight_roles(self) -> list[str]:
        return [piece.role for piece in self.block.slices if not piece.is_bias]

    @property
    def bias_roles(self) -> list[str]:
        return [piece.role for piece in self.block.slices if piece.is_bias]

    def width(self, role: str) -> int:
        return self.block[role].width

    def sample_initial(
        self, n: int, generator: torch.Generator, roles: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        return self.distribution.sample(n, generator, roles)

    def mean_std(self, role: str) -> tuple[Tensor, Tensor]:
        piece = self.block[role]
        return piece.storage.mean_std(piece)

    def read(self, index: Tensor) -> dict[str, Tensor]:
        return self.block.read(index)

    def norms(self) -> tuple[Tensor, Tensor]:
        return self.block.norms()


@dataclass
class NeuronTable:
    """The blocks of one model and the state of their neurons.

    There is one table per model (`NeuronTable.of`), so that callbacks which know nothing of each other agree on
    which neurons are immune or fading in; it goes when the model goes.

    Attributes:
        blocks: in the model's own order.
        views: what a reinitialization may see of each block.
        pattern: the layout that the blocks were found by, see `find_feed_forwards`; None: by the family's or their
            shapes.
        ff_blocks: the part of a composite model that they were looked for in, see `find_feed_forwards`; None: all.
        states: one for each block.
        phases: selection phases that happened so far.
        overtrain_samples, overtrain_tokens: samples and tokens of the extra batches that overtraining
            took so far, by all processes together.
        skipped_steps: steps of the Trainer in which the optimizer took none (a gradient scaler found an overflow).
        optimizer_entries_reset: numbers of the optimizer's state that phases have reset so far.
        initial_weights: checksum of the file with the weights that the run began with, see `l2_init`; 0: there is none.
    """

    blocks: list[FeedForward]
    views: list[BlockView]
    pattern: str | None = None
    ff_blocks: str | None = None
    states: list[BlockState] = field(default_factory=list)
    phases: int = 0
    overtrain_samples: int = 0
    overtrain_tokens: int = 0
    skipped_steps: int = 0
    optimizer_entries_reset: int = 0
    initial_weights: int = 0
    _noted: int = -1
    _run: object = None

    def __post_init__(self):
        if not self.states:
            self.reset()

    @classmethod
    def of(cls, model: nn.Module, pattern: str | None = None, ff_blocks: str | None = None) -> "NeuronTable":
        """The table of an unwrapped model, made at the first call, and anew for another pattern or part of it. What
        looks like a block but has an unknown layout causes a warning then.

        Raises:
            ValueError: if the model has no feed-forward block.
        """
        table = _tables.get(model)
        if table is None or pattern not in (None, table.pattern) or ff_blocks not in (None, table.ff_blocks):
            found = survey(model, pattern, ff_blocks)
            if found.left_out:
                logger.warning(
                    f"{len(found.left_out)} modules of {type(model).__name__} look like feed-forward blocks and are "
                    f"left out, because their layout is unknown: {summary(found.left_out)}. No method touches them; "
                    f"{len(found.blocks)} blocks were found."
                )
            fresh = FreshModules(model)
            views = [BlockView(model, block, fresh) for block in found.blocks]
            table = _tables[model] = cls(found.blocks, views, pattern, ff_blocks)
        return table

    @property
    def fresh(self) -> FreshModules:
        """Fresh instances of the model's modules."""
        return self.views[0].fresh

    @staticmethod
    def forget_unless(model: nn.Module, pattern: str | None, ff_blocks: str | None) -> None:
        """Forgets the table of `model` if its blocks were looked for in another way."""
        table = _tables.get(model)
        if table is not None and (table.pattern, table.ff_blocks) != (pattern, ff_blocks):
            del _tables[model]

    def reset(self) -> None:
        """Forgets everything that happened; weights stay as they are."""
        self.states = [BlockState.fresh(block.num_neurons) for block in self.blocks]
        self.phases = self.skipped_steps = self.overtrain_samples = self.overtrain_tokens = 0
        self.optimizer_entries_reset = self.initial_weights = 0
        self._noted = -1

    def start(self, run: object) -> None:
        """Forgets everything at the beginning of a training, once, however many callbacks begin it.

        Args:
            run: an object that belongs to this training alone, such as its `TrainerState`.
        """
        if self._run is not run:
            self.reset()
            self._run = run

    def note_step(self, step: int, stepped: bool) -> None:
        """Counts a step of the Trainer that the optimizer skipped, once, however many callbacks tell of it.

        Args:
            step: number of the Trainer's steps before this one.
        """
        if not stepped and step != self._noted:
            self.skipped_steps += 1
        self._noted = step

    def optimizer_steps(self, step: int) -> int:
        """How many steps the optimizer has taken at step `step` of the Trainer: what schedules and seeds count in, so
        that a skipped step is as if its batch had never been."""
        return step - self.skipped_steps

    @property
    def counts(self) -> dict[str, Tensor]:
        """Times recycled, `{block name: int32 (d_ff,)}`."""
        return {block.name: state.counts for block, state in zip(self.blocks, self.states, strict=True)}

    @property
    def pruned(self) -> dict[str, Tensor]:
        """Pruned neurons, `{block name: bool (d_ff,)}`."""
        return {block.name: state.pruned for block, state in zip(self.blocks, self.states, strict=True)}

    @property
    def fading_in(self) -> int:
        return sum(len(state.fade_in) for state in self.states if state.fade_in is not None)

    def magnitudes(self) -> dict[str, Tensor]:
        """`{block name: float32 (d_ff,)}` on the CPU, of the weights that the model computes with."""
        found = magnitudes_of(self.blocks)
        for block, state, magnitudes in zip(self.blocks, self.states, found, strict=True):
            _make_effective(magnitudes, block, state)
        return {block.name: values for block, values in zip(self.blocks, on_cpu(found), strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as CPU tensors, for `recycling_state.safetensors`; to be called on every process."""
        tensors = {f"trainer/{name}": torch.tensor([getattr(self, name)], dtype=torch.int64) for name in _COUNTERS}
        for block, state in zip(self.blocks, self.states, strict=True):
            # Block by block to the CPU: whole lines of all blocks may be more than a device holds beside the model.
            for key, value in _tensors_of(block, state).items():
                tensors[f"{block.name}/{key}"] = value.detach().cpu().clone().contiguous()
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: if the tensors do not fit the model's blocks.
        """
        states = [self._load_block(block, tensors) for block in self.blocks]
        counters = {name: tensors.get(f"trainer/{name}", torch.tensor([0])) for name in _COUNTERS}
        for name, value in counters.items():
            if value.shape != (1,) or value.dtype != torch.int64 or value < 0:
                raise ValueError(f"trainer/{name} must be one whole number from 0.")
        self.states = states
        for name, value in counters.items():
            setattr(self, name, int(value))

    def _load_block(self, block: FeedForward, tensors: dict[str, Tensor]) -> BlockState:
        columns = {}
        for column in ("counts", "last_phase", "last_step"):
            values = tensors.get(f"{block.name}/{column}")
            if values is None or values.shape != (block.num_neurons,):
                found = "is missing" if values is None else f"has shape {tuple(values.shape)}"
                raise ValueError(f"{block.name}/{column} {found}, expected ({block.num_neurons},).")
            columns[column] = values.clone()
        for column, dtype in (("skipped_steps", torch.int64), ("pruned", torch.bool)):
            values = tensors.get(f"{block.name}/{column}", torch.zeros(block.num_neurons, dtype=dtype))
            if values.shape != (block.num_neurons,) or values.dtype != dtype:
                raise ValueError(f"{block.name}/{column} has shape {tuple(values.shape)} and dtype {values.dtype}.")
            columns[column] = values.clone()
        state = BlockState(**columns)  # type: ignore[arg-type]  # the columns are tensors
        prefix = f"{block.name}/fade_in"
        if f"{prefix}/index" in tensors:
            state.fade_in = _load_fade_in(block, prefix, tensors)
        return state


_COUNTERS = (
    "phases",
    "skipped_steps",
    "overtrain_samples",
    "overtrain_tokens",
    "optimizer_entries_reset",
    "initial_weights",
)


def _make_effective(magnitudes: Tensor, block: FeedForward, state: BlockState) -> None:
    if state.fade_in is None or not block.out_slice.storage.separate_masters:
        return
    # The masters of neurons that fade in hold their new weights.
    index = state.fade_in.index
    lines = {
        p.role: p.storage.gather(p, index, p.storage.read_forward(p, index)) for p in block.slices if not p.is_bias
    }
    out = lines.pop("out").float().norm(dim=1)
    magnitudes[index.to(magnitudes.device)] = torch.cat(list(lines.values()), dim=1).float().norm(dim=1) * out


def _tensors_of(block: FeedForward, state: BlockState) -> dict[str, Tensor]:
    tensors = {"counts": state.counts, "last_phase": state.last_phase, "last_step": state.last_step}
    tensors |= {name: value for name in ("skipped_steps", "pruned") if (value := getattr(state, name)).any()}
    fade_in = state.fade_in
    if fade_in is not None:
        tensors |= {"fade_in/index": fade_in.index, "fade_in/age": fade_in.age}
        for side, lines in zip(("old", "new"), fade_in.lines(block), strict=True):
            tensors |= {f"fade_in/{side}/{role}": values for role, values in lines.items()}
    return tensors


def _load_fade_in(block: FeedForward, prefix: str, tensors: dict[str, Tensor]) -> FadeIn:
    index, age = tensors[f"{prefix}/index"], tensors.get(f"{prefix}/age")
    n = len(index) if index.dim() == 1 else -1
    fits = n > 0 and index.dtype == torch.int64 and bool(((index >= 0) & (index < block.num_neurons)).all())
    fits = fits and len(index.unique()) == n
    if not fits or age is None or age.shape != (n,) or age.dtype != torch.int64 or int(age.min()) < 0:
        raise ValueError(f"{prefix} holds no valid neuron indices and ages.")
    sides: dict[str, dict[str, Tensor]] = {"old": {}, "new": {}}
    for side, values in sides.items():
        for piece in block.slices:
            found = tensors.get(f"{prefix}/{side}/{piece.role}")
            expected = () if piece.is_bias else (piece.width,)
            fits = found is not None and found.is_floating_point() and found.shape == (n, *expected)
            if found is None or not fits or not found.isfinite().all():
                raise ValueError(f"{prefix}/{side}/{piece.role} must hold {n} finite lines of shape {expected}.")
            values[piece.role] = found.clone()  # in the precision of the masters, which may be more than the model's
    return FadeIn(index.clone(), age.clone(), sides["old"], sides["new"], whole=True)


_tables: "weakref.WeakKeyDictionary[nn.Module, NeuronTable]" = weakref.WeakKeyDictionary()
