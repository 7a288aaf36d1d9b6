"""What optimizers keep for a neuron's weights, and how it is reset when the neuron is recycled.

One table says which entries of an optimizer's state are a first moment (a running mean of gradients: zero for a fresh
neuron) and which a second moment (a running mean of squared gradients). To support an optimizer, add its entries.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.quantized_state import dequantized, is_quantized
from hf_recycle.neurons.storage.plain import whole
from hf_recycle.neurons.storage.tiles import Tile

FIRST, SECOND, SHARED = "first", "second", "shared"

# State entries by optimizer class. "second:rows" and "second:columns" are Adafactor's factored second moment: one
# number for each row, or each column, of the parameter. SHARED entries say nothing of a single neuron.
_ADAM = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND, "step": SHARED}
_ROWS, _COLUMNS = "second:rows", "second:columns"
_LAYOUTS: dict[type | str, dict[str, str]] = {
    torch.optim.Adam: _ADAM,  # AdamW is a subclass, and fused changes nothing of the state
    torch.optim.NAdam: {**_ADAM, "mu_product": SHARED},
    torch.optim.RAdam: _ADAM,
    torch.optim.SGD: {"momentum_buffer": FIRST},
    torch.optim.Muon: {"momentum_buffer": FIRST},
    torch.optim.RMSprop: {"square_avg": SECOND, "grad_avg": FIRST, "momentum_buffer": FIRST, "step": SHARED},
    torch.optim.Adagrad: {"sum": SECOND, "step": SHARED},
    torch.optim.Adafactor: {"row_var": _ROWS, "col_var": _COLUMNS, "variance": SECOND, "step": SHARED},
    transformers.Adafactor: {
        "exp_avg": FIRST,
        "exp_avg_sq": SECOND,
        "exp_avg_sq_row": _ROWS,
        "exp_avg_sq_col": _COLUMNS,
        "step": SHARED,
        "RMS": SHARED,
    },
    # By name, because they need not be installed, or importing them takes seconds.
    "hf_recycle.trainer.muon.MuonWithAdamW": {**_ADAM, "momentum_buffer": FIRST},
    "deepspeed.ops.adam.fused_adam.FusedAdam": _ADAM,
    "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam": _ADAM,
    "torchao.optim.adam.AdamW8bit": _ADAM,
    "optimi.stableadamw.StableAdamW": {
        **_ADAM,
        "kahan_comp": FIRST,  # what rounding has lost of the old weights
        "eps_sq": SHARED,
        "mean_square": SHARED,
    },
    "lion_pytorch.lion_pytorch.Lion": {"exp_avg": FIRST},
    "bitsandbytes.optim.adamw.AdamW": {"state1": FIRST, "state2": SECOND},
    "bitsandbytes.optim.ademamix.AdEMAMix": {"state1": FIRST, "state2": SECOND},  # two first moments in one entry
    "bitsandbytes.optim.lion.Lion": {"state1": FIRST},
    "bitsandbytes.optim.rmsprop.RMSprop": {"state1": SECOND},
}
# Of 8-bit entries, beside the codes.
_OF_QUANTIZATION = {"qmap1", "qmap2", "absmax1", "absmax2"}

# Why optimizers can't be reset, by class or package. Looked up before the layouts: GaLore's come from others.
_REFUSED = {
    "torchao.optim.adam.AdamW4bit": "its 4-bit second moment has no zero, and 16 values for whatever lies in a block",
    "galore_torch": "it keeps the moments of projected gradients, which may belong to no single neuron",
    "apollo_torch": "it keeps the moments of projected gradients, which may belong to no single neuron",
    "grokadamw": "it keeps its state outside of the optimizer's own, where no checkpoint has it either",
}
_NOT_SHARDED = ("torchao", "bitsandbytes")

# LOMO, and what the Trainer shows in place of layer-wise optimizers (GaLore, APOLLO).
_STEP_IN_BACKWARD = {"Lomo", "AdaLomo", "LayerWiseDummyOptimizer"}
_FACTORED = (torch.optim.Adafactor, transformers.Adafactor)


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside wrappers such as Accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_can_reset(optimizer, mode: str, blocks: Iterable[FeedForward] = ()) -> None:
    """Refuses, before training, an optimizer whose state can't be reset.

    Args:
        blocks: those that may be reset.

    Raises:
        ValueError: if `mode` is not "keep" and the optimizer's state is unknown, or known to be out of reach: by
            itself, or where these blocks are sharded.
    """
    if mode == "keep":
        return
    optimizer = unwrap_optimizer(optimizer)
    _layout_of(optimizer)
    package = type(optimizer).__module__.partition(".")[0]
    if package in _NOT_SHARDED and any(piece.storage.sharded for block in blocks for piece in block.slices):
        raise ValueError(_refusal(optimizer, "its state can be reset on one process and under DDP only"))


def check_state(optimizer, blocks: list[FeedForward], mode: str) -> None:
    """Refuses an optimizer that turns out to keep something unknown, as a subclass of a known one may.

    Args:
        optimizer: one that has taken a step, wrapped or not.

    Raises:
        ValueError: if `mode` is not "keep" and an entry of its state of some neurons is not known.
    """
    if mode == "keep":
        return
    optimizer = unwrap_optimizer(optimizer)
    layout = _layout_of(optimizer)
    for piece in (piece for block in blocks for piece in block.slices):
        for key, value in piece.storage.optimizer_state(optimizer, piece).items():
            _check_entry(optimizer, layout, piece, key, value)


def _check_entry(
    optimizer, layout: dict[str, str], piece: NeuronSlice, key: str, value: list[Tile] | Tensor | None
) -> None:
    if key in _OF_QUANTIZATION:
        return
    if key not in layout and (isinstance(value, list) or (isinstance(value, Tensor) and value.numel() > 1)):
        raise ValueError(_refusal(optimizer, f"its state {key!r} is unknown"))
    if layout.get(key) in (FIRST, SECOND) and isinstance(value, Tensor) and not _is_laid_out(piece, value):
        raise ValueError(_refusal(optimizer, f"its state {key!r} is not laid out like the weights"))
    if layout.get(key) in (_ROWS, _COLUMNS) and piece.expert is None and piece.parameter.dim() > 2:
        raise ValueError(_refusal(optimizer, "it factors the state of a convolution by its kernel, not by channels"))


def check_optimizer(optimizer, field: str, value: float) -> None:
    """Refuses, before training, optimizers under which no method can tell or change what a neuron's weights are.

    Args:
        field, value: the argument that switched the method on, for the message.

    Raises:
        ValueError: for optimizers that update weights during the backward pass, schedule-free ones, and Adafactor on
            sharded parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if names & _STEP_IN_BACKWARD:
        why = "it updates weights during the backward pass, where its steps can't be followed"
    elif any("ScheduleFree" in name for name in names):
        why = "it keeps a second copy of the weights, which would bring old neurons back"
    elif isinstance(optimizer, _FACTORED) and any(isinstance(p, DTensor) for p in _parameters(optimizer)):
        why = "its factored state does not work with parameters that FSDP2 or tensor parallelism has sharded"
    else:
        return
    raise ValueError(f"{field}={value} can't be used with {_name(optimizer)}: {why}; use optim='adamw_torch', say.")


def _is_laid_out(piece: NeuronSlice, value: Tensor) -> bool:
    """Whether an entry that is not one or more tiles is laid out like the parameter after all: quantised, or two in
    one."""
    return piece.parameter.shape in (value.shape, value.shape[1:]) and not piece.storage.sharded


@torch.no_grad()
def reset_state(optimizer, block: FeedForward, index: Tensor, mode: str) -> int:
    """Resets the optimizer state of neurons `index` `(n,)` of a block, in place.

    Args:
        mode: "reset": first moment zero, second moment one scalar per matrix, the mean over the entries of the
            neurons that are not in `index`; "zero": both zero; "keep": nothing changes.

    Returns:
        How many numbers were reset, over all processes that share the block.

    The mean, because all of Adam's entries share one step count: its bias correction no longer makes up for a second
    moment that starts again from zero, and a reborn neuron would overshoot.
    """
    if mode == "keep" or not len(index):
        return 0
    optimizer = unwrap_optimizer(optimizer)
    layout = _layout_of(optimizer)
    count = 0
    for piece in block.slices:
        state = optimizer.state.get(piece.parameter, {})
        for key, value in piece.storage.optimizer_state(optimizer, piece).items():
            _check_entry(optimizer, layout, piece, key, value)
            kind = layout.get(key)
            if key in state and is_quantized(state, key):
                with dequantized(state, key) as values:
                    count += _reset(piece, kind, values, index, mode)
            else:
                count += _reset(piece, kind, value, index, mode)
    if block.out_slice.storage.sharded:
        total = torch.tensor(count, device=block.out_slice.device)
        count = int(block.out_slice.storage.sum_over_processes(block.out_slice, total))
    return count


def _reset(piece: NeuronSlice, kind: str | None, value: list[Tile] | Tensor | None, index: Tensor, mode: str) -> int:
    """Resets one entry of the state of a slice's parameter; how many numbers of it this process holds."""
    count = 0
    for tiles in _tiles(piece, kind, value):
        # With every neuron reborn there are no others to learn the scale of gradients from but the old ones.
        mean = kind != FIRST and mode == "reset"
        width = 1 if kind in (_ROWS, _COLUMNS) else piece.width
        piece.storage.fill(tiles, index, piece.storage.mean_of_others(piece, tiles, index, width) if mean else 0.0)
        count += sum(len(tile.rows(index)[1]) * tile.values.shape[1] for tile in tiles)
    return count


def _tiles(piece: NeuronSlice, kind: str | None, value: list[Tile] | Tensor | None) -> list[list[Tile]]:
    """The parts of one state entry that belong to the slice's neurons: usually one, or none."""
    if kind in (_ROWS, _COLUMNS):
        if (piece.dim == 0) != (kind == _ROWS) or not isinstance(value, Tensor):
            return []  # averaged over neurons: it belongs to no single one
        lines = (value if piece.expert is None else value[piece.expert]).view(-1)
        return [[Tile(lines[piece.offset :: piece.stride][: piece.length].unsqueeze(1), 0, 0)]]
    if kind not in (FIRST, SECOND) or value is None:
        return []
    if isinstance(value, Tensor):
        parts = [value] if value.shape == piece.parameter.shape else list(value)
        return [whole(piece, part) for part in parts]
    return [value]


def kinds_of_entries() -> dict[str, str]:
    """What an entry of an optimizer's state is, by its name, where all optimizers that are known mean the same."""
    found: dict[str, set[str]] = {}
    for layout in _LAYOUTS.values():
        for key, kind in layout.items():
            found.setdefault(key, set()).add(kind)
    return {key: next(iter(kinds)) for key, kinds in found.items() if len(kinds) == 1}


@torch.no_grad()
def resized_entry(
    key: str, value: Any, pairs: Sequence[tuple[NeuronSlice, NeuronSlice]], kept: Sequence[Tensor]
) -> Any:
    """One entry of the state of a parameter whose blocks get another number of neurons, as `reset_state` leaves it: of
    those that stay as it is, and for those that are added as if they had just been reborn.

    Args:
        value: whole, as a single process keeps it.
        pairs: each slice of the parameter in the model as it is, and the same in the new one.
        kept: for each pair, the indices of the neurons that stay, which are the first ones of the new block.

    Raises:
        ValueError: what it holds is not known, or not laid out by neurons.
    """
    old_shape, new_shape = pairs[0][0].parameter.shape, pairs[0][1].parameter.shape
    kind = kinds_of_entries().get(key)
    single = not isinstance(value, Tensor) or value.numel() == 1
    if single or kind == SHARED:
        return value
    if kind in (_ROWS, _COLUMNS) and pairs[0][0].expert is None and len(old_shape) == 2:
        dim = 0 if kind == _ROWS else 1
        if pairs[0][0].dim != dim:
            return value  # averaged over neurons
        new = value.new_zeros([new_shape[dim] if size > 1 else 1 for size in value.shape])
    elif kind in (FIRST, SECOND) and type(value) is Tensor and value.shape == old_shape:
        new = value.new_zeros(new_shape)
    else:
        raise ValueError(f"the optimizer state {key!r} is unknown, quantised, or not laid out by neurons")
    for (before, after), index in zip(pairs, kept, strict=True):
        for old_tiles, new_tiles in zip(_tiles(before, kind, value), _tiles(after, kind, new), strict=True):
            lines, target = old_tiles[0].values[index.to(value.device)], new_tiles[0].values
            target[: len(index)] = lines
            if kind != FIRST and len(target) > len(index):
                target[len(index) :] = lines.mean()
    return new


def check_was_reset(optimizer, blocks: list[FeedForward], count: int) -> None:
    """Raises if neurons were recycled and no number of the optimizer's state was reset, though it keeps some.

    Args:
        optimizer: one that has taken a step, wrapped or not.
        blocks: those with recycled neurons.
        count: numbers that were reset in all of them.

    Raises:
        ValueError: as said.
    """
    optimizer = unwrap_optimizer(optimizer)
    if count or (isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)):
        return
    pieces = [piece for block in blocks for piece in block.slices]
    if not optimizer.state or any(piece.storage.optimizer_state(optimizer, piece) for piece in pieces):
        raise ValueError(_refusal(optimizer, "nothing of its state was found to reset after neurons were recycled"))


class StepWatch:
    """Learns from the optimizer itself whether it stepped and with which learning rates.

    Trainer events can't tell: DeepSpeed steps inside backward, its scheduler moves on before they fire, and Accelerate
    misreports skipped steps of fused optimizers.

    Args:
        optimizer: the optimizer, wrapped or not.

    Attributes:
        stepped: whether a step was taken since the last `reset`.
    """

    def __init__(self, optimizer):
        self._wrapped, self._optimizer = optimizer, unwrap_optimizer(optimizer)
        self._handle = self._optimizer.register_step_pre_hook(self._before_step)
        self.reset()

    def reset(self) -> None:
        self.stepped = False
        self._rates: dict[int, float | Tensor] = {}

    def remove(self) -> None:
        """Stops watching."""
        self._handle.remove()

    def _before_step(self, optimizer, args, kwargs) -> None:
        # A fused optimizer is called for a step that it will skip, with the gradient scaler's verdict.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        self.stepped = True
        # By the group's identity: DeepSpeed steps one group at a time and swaps the lists for that. Copies: a scheduler
        # changes a rate that is a tensor in place.
        rates = ((id(group), group["lr"]) for group in optimizer.param_groups)
        self._rates |= {group: rate.clone() if isinstance(rate, Tensor) else rate for group, rate in rates}

    def is_optimized(self, piece: NeuronSlice) -> bool:
        """Whether the optimizer has the slice's parameter."""
        return piece.storage.group_of(piece, self._wrapped) >= 0

    def rate(self, piece: NeuronSlice) -> float | Tensor:
        """The learning rate the last step had for a slice's parameter; 0 for a parameter that is not optimized."""
        group = piece.storage.group_of(piece, self._wrapped)
        return self._rates.get(id(self._optimizer.param_groups[group]), 0.0) if group >= 0 else 0.0

    def highest_rate(self, piece: NeuronSlice) -> float | Tensor:
        """The learning rate that the parameter's schedule starts from or warms up to."""
        group = piece.storage.group_of(piece, self._wrapped)
        if group < 0:
            return 0.0
        found = self._optimizer.param_groups[group]
        return found.get("initial_lr", found["lr"])


def _layout_of(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    name = _full_name(type(optimizer))
    if why := _REFUSED.get(name, _REFUSED.get(name.partition(".")[0])):
        raise ValueError(_refusal(optimizer, why))
    if getattr(optimizer, "is_paged", False):
        raise ValueError(_refusal(optimizer, "its state lies in memory that the device may be writing to (paged)"))
    for cls in type(optimizer).__mro__:
        for key in (cls, _full_name(cls)):
            if key in _LAYOUTS:
                return _LAYOUTS[key]
    raise ValueError(_refusal(optimizer, "its state is unknown"))


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _name(optimizer: torch.optim.Optimizer) -> str:
    """With its package where that matters: bitsandbytes has an AdamW of its own."""
    cls = type(optimizer)
    package = cls.__module__.partition(".")[0]
    return cls.__name__ if package in ("torch", "transformers") else f"{cls.__name__} of {package}"


def _refusal(optimizer: torch.optim.Optimizer, why: str) -> str:
    known = dict.fromkeys(cls.__name__ for cls in _LAYOUTS if isinstance(cls, type))
    return (
        f"recycle_optimizer_state='reset' or 'zero' can't be used with {_name(optimizer)}: {why}; "
        f"use recycle_optimizer_state='keep', or one of {', '.join(known)}."
    )
