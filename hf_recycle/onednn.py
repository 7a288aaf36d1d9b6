"""Linear layers by oneDNN, where PyTorch's usual matrix products leave half of the processor unused.

On x86 PyTorch multiplies float32 matrices by MKL, which keeps its AVX-512 kernels for Intel's processors. oneDNN, which
is in PyTorch too, asks what a processor can do and not who made it: on AMD's Zen 5, whose units are that wide, it is
about twice as fast. The numbers are float32 as before; only the order of sums differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

_LEAST_WORK = 1 << 22
"""Multiplications. Smaller products are not faster, and each shape costs half a megabyte of generated code."""

_COLUMNS_AT_ONCE = 1 << 10
"""Of the output's gradient, whose columns have to be laid out as rows first: not all in memory at once."""

_ZEN_5 = 26
_CPU_FACTS = Path("/proc/cpuinfo")


def is_available() -> bool:
    """Whether this PyTorch has oneDNN, and it is not switched off (`torch.backends.mkldnn`)."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@cache
def is_faster() -> bool:
    """Whether oneDNN is known to be faster here: by what the processor is, as a measurement could turn out otherwise
    when a run is resumed."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return is_available() and torch.backends.mkl.is_available() and wide and _amd_family() >= _ZEN_5


def _amd_family() -> int:
    """The family of AMD's processors that this one is of; 0 for another maker's, or where the system does not tell."""
    if not _CPU_FACTS.exists():
        return 0
    facts: dict[str, str] = {}
    for line in _CPU_FACTS.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    family = facts.get("cpu family", "")
    return int(family) if facts.get("vendor_id") == "AuthenticAMD" and family.isdecimal() else 0


@contextmanager
def onednn_linear(model: nn.Module) -> Iterator[None]:
    """Within the context, the `nn.Linear` layers of `model` (subclasses left out) compute by oneDNN, forward and
    backward, what is float32 on a CPU, outside of autocast and of compiled code."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        # The class, not the instance's `forward`: copies and pickles of the model stay right.
        layer.__class__ = OneDNNLinear
    try:
        yield
    finally:
        for layer in layers:
            if type(layer) is OneDNNLinear:  # an engine may have made another class of it
                layer.__class__ = nn.Linear


class OneDNNLinear(nn.Linear):
    """A linear layer that computes by oneDNN where that applies."""

    def forward(self, input: Tensor) -> Tensor:
        if not _applies(input, self.weight):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


def _applies(values: Tensor, weight: Tensor) -> bool:
    plain = type(values) is Tensor and type(weight) in (Tensor, nn.Parameter) and values.dim() > 1  # no DTensor
    alike = values.dtype == weight.dtype == torch.float32 and values.device == weight.device == torch.device("cpu")
    own = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return plain and alike and not own and values.numel() * weight.shape[0] >= _LEAST_WORK


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        return _product(values.flatten(0, -2), weight, bias).view(*values.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        values, weight = ctx.saved_tensors
        rows, lines = gradient.flatten(0, -2), values.flatten(0, -2)
        of_values, of_weight, of_bias = ctx.needs_input_grad
        # With a graph of the backward pass (second derivatives) by operations that autograd knows.
        product, outer = (_known_product, _known_outer) if torch.is_grad_enabled() else (_product, _outer)
        return (
            product(rows, weight.T).view(values.shape) if of_values else None,
            outer(rows, lines) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` `(m, k)` @ `weight` `(n, k)`.T + `bias` `(n,)`: `(m, n)`."""
    count = len(rows)
    return multiply(_padded(rows), weight, bias)[:count]


def _outer(rows: Tensor, lines: Tensor) -> Tensor:
    """`rows` `(m, n)`.T @ `lines` `(m, k)`: `(n, k)`."""
    rows, lines = _padded(rows), _padded(lines).contiguous()
    if rows.shape[1] <= _COLUMNS_AT_ONCE:
        return multiply(rows.T, lines.T)
    product = rows.new_empty(rows.shape[1], lines.shape[1])
    for part, columns in zip(product.split(_COLUMNS_AT_ONCE), rows.split(_COLUMNS_AT_ONCE, dim=1), strict=True):
        # Copied first, because PyTorch transposes contiguous matrices several times as fast.
        part.copy_(multiply(columns.contiguous().T, lines.T))
    return product


def _known_product(rows: Tensor, weight: Tensor) -> Tensor:
    return rows @ weight.T


def _known_outer(rows: Tensor, lines: Tensor) -> Tensor:
    return rows.T @ lines


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` `(m, k)` @ `weight` `(n, k)`.T + `bias` `(n,)`: float32 `(m, n)`, by oneDNN; copies `rows` unless they are
    contiguous. Nothing that autograd could go back through."""
    # The operation that torch.compile makes linear layers of on a CPU.
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _padded(rows: Tensor) -> Tensor:
    """`rows` `(m, k)` and rows of zeros, up to one of eight numbers between two powers of two: oneDNN generates code
    for each shape and keeps it, and the numbers of masked tokens are many."""
    step = 1 << max(len(rows).bit_length() - 4, 0)
    missing = -len(rows) % step
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
