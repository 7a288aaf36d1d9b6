"""What optimizers keep beside a neuron's weights, and how it is reset when the neuron is reborn.

One table says which entries of an optimizer's state are a first moment (a running mean of gradients: zero for a fresh
neuron) and which a second moment (a running mean of squared gradients). To support an optimizer, add its entries.
"""

import torch
import transformers
from torch import Tensor

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice

FIRST, SECOND, SHARED = "first", "second", "shared"

# State entries by optimizer class. "second:rows" and "second:columns" are Adafactor's factored second moment: one
# number for each row, or each column, of the parameter. SHARED entries say nothing of a single neuron.
_ADAM = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND, "step": SHARED}
_ROWS, _COLUMNS = "second:rows", "second:columns"
_LAYOUTS: dict[type, dict[str, str]] = {
    torch.optim.Adam: _ADAM,  # AdamW is a subclass, and fused changes nothing of the state
    torch.optim.NAdam: {**_ADAM, "mu_product": SHARED},
    torch.optim.RAdam: _ADAM,
    torch.optim.SGD: {"momentum_buffer": FIRST},
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
}


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside wrappers such as Accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_can_reset(optimizer, mode: str) -> None:
    """Refuses, before training, an optimizer whose state can't be reset.

    Raises:
        ValueError: if `mode` is not "keep" and the optimizer's state is unknown.
    """
    if mode != "keep":
        _layout_of(unwrap_optimizer(optimizer))


def learning_rates(optimizer, *, highest: bool = False) -> dict[int, float | Tensor]:
    """The current learning rate of each parameter, by `id(parameter)`; with `highest` the one that a schedule starts
    from or warms up to."""
    groups = unwrap_optimizer(optimizer).param_groups
    rates = [group.get("initial_lr", group["lr"]) if highest else group["lr"] for group in groups]
    return {id(p): rate for group, rate in zip(groups, rates, strict=True) for p in group["params"]}


@torch.no_grad()
def reset_state(optimizer, block: FeedForward, index: Tensor, mode: str) -> None:
    """Resets the optimizer state of neurons `index` `(n,)` of a block, in place.

    Args:
        mode: "reset": first moment zero, second moment one scalar per matrix, the mean over the entries of the
            neurons that are not in `index`; "zero": both zero; "keep": nothing changes.

    The mean, because all of Adam's entries share one step count: its bias correction no longer makes up for a second
    moment that starts again from zero, and a reborn neuron would overshoot.
    """
    if mode == "keep" or not len(index):
        return
    optimizer = unwrap_optimizer(optimizer)
    layout = _layout_of(optimizer)
    for piece in block.slices:
        state = optimizer.state.get(piece.parameter, {})
        for key, value in state.items():
            kind = layout.get(key)
            if kind is None and isinstance(value, Tensor) and value.shape == piece.parameter.shape:
                raise ValueError(_refusal(optimizer, f"its state {key!r} is unknown"))
            if kind in (None, SHARED) or not isinstance(value, Tensor):
                continue
            lines = _lines(piece, kind, value)
            if lines is not None:
                _reset_lines(lines, index.to(lines.device), SECOND if kind != FIRST and mode == "reset" else FIRST)


def _lines(piece: NeuronSlice, kind: str, value: Tensor) -> Tensor | None:
    """The part of one state tensor that belongs to the slice's neurons, neurons first; None if it has none."""
    if kind in (_ROWS, _COLUMNS):
        if (piece.dim == 0) != (kind == _ROWS):
            return None  # averaged over neurons: it belongs to no single one
        value = value.reshape(-1)
        return value.narrow(0, piece.offset, piece.length)
    return piece.storage.lines(piece, value)


def _reset_lines(lines: Tensor, index: Tensor, kind: str) -> None:
    if kind == FIRST:
        lines.index_fill_(0, index, 0)
        return
    others = torch.ones(len(lines), dtype=torch.bool, device=lines.device).index_fill_(0, index, False)
    # With every neuron reborn there are no others to learn the scale of gradients from but the old ones.
    mean_over = lines[others] if others.any() else lines
    mean = mean_over.to(torch.promote_types(lines.dtype, torch.float32)).mean()
    lines.index_fill_(0, index, mean.to(lines.dtype))


def _layout_of(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    for cls in type(optimizer).__mro__:
        if cls in _LAYOUTS:
            return _LAYOUTS[cls]
    raise ValueError(_refusal(optimizer, "its state is unknown"))


def _refusal(optimizer: torch.optim.Optimizer, why: str) -> str:
    known = dict.fromkeys(cls.__name__ for cls in _LAYOUTS)
    return (
        f"recycle_optimizer_state='reset' or 'zero' can't be used with {type(optimizer).__name__}: {why}; "
        f"use recycle_optimizer_state='keep', or one of {', '.join(known)}."
    )
