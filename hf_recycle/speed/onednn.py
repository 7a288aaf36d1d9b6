"""Linear layers by oneDNN, where PyTorch's usual matrix products leave half of the processor unused.

On x86 PyTorch multiplies float32 matrices by MKL, which keeps its AVX-512 kernels for Intel's processors. oneDNN, which
is in PyTorch too, asks what a processor can do and not who made it: on AMD's Zen 5, whose units are that wide, it is
about twice as fast, and a step of BERT Medium 1.5 times (docs/benchmarks.md). The numbers are float32 as before; only
the order of sums differs. On other processors it gains nothing, so it is off unless asked for.
"""

import torch
from torch import Tensor, nn

from hf_recycle.internals.of_torch import linear_by_onednn, transforms_are_active
from hf_recycle.utils.forwards import Forward

_LEAST_WORK = 1 << 22
"""Multiplications. Smaller products are not faster, and each shape costs half a megabyte of generated code."""

_COLUMNS_AT_ONCE = 1 << 10
"""Of the output's gradient, whose columns have to be laid out as rows first: not all in memory at once."""


def is_available() -> bool:
    """Whether this PyTorch has oneDNN, and it is not switched off (`torch.backends.mkldnn`)."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class OneDNNLinear(Forward):
    """The forward of an `nn.Linear` by oneDNN, and its backward pass: of what is float32 on a CPU, outside of autocast,
    compiled code and transforms of `torch.func`."""

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.own.__self__
        if not _applies(input, layer.weight):
            return self.original(input)
        rows = _Linear.apply(input.flatten(0, -2), layer.weight, layer.bias)
        return rows.view(*input.shape[:-1], layer.weight.shape[0])


def onednn_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """For the `nn.Linear` layers of `model`; subclasses are left out."""
    return {module: OneDNNLinear(module.forward) for module in model.modules() if type(module) is nn.Linear}


def _applies(values: Tensor, weight: Tensor) -> bool:
    plain = type(values) is Tensor and type(weight) in (Tensor, nn.Parameter) and values.dim() > 1  # no DTensor
    alike = values.dtype == weight.dtype == torch.float32 and values.device == weight.device == torch.device("cpu")
    others = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or transforms_are_active()
    return plain and alike and not others and values.numel() * weight.shape[0] >= _LEAST_WORK


class _Linear(torch.autograd.Function):
    """`rows` `(m, k)` @ `weight` `(n, k)`.T + `bias` `(n,)`. The result is no view, so it can be changed in place."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_rows, of_weight, _ = ctx.needs_input_grad
        # Only what is needed, as torch does: the rest may be changed in place before the backward pass.
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        # With a graph of the backward pass (second derivatives) by operations that autograd knows.
        product, outer = (_known_product, _known_outer) if torch.is_grad_enabled() else (_product, _outer)
        return (
            product(gradient, weight.T) if of_rows else None,
            outer(gradient, rows) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` `(m, k)` @ `weight` `(n, k)`.T + `bias` `(n,)`: `(m, n)`."""
    return multiply(_padded(rows), weight, bias).resize_(len(rows), len(weight))  # cuts the rows of the padding off


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
    return linear_by_onednn(rows, weight, bias)


def _padded(rows: Tensor) -> Tensor:
    """`rows` `(m, k)` and rows of zeros, up to one of eight numbers between two powers of two: oneDNN generates code
    for each shape and keeps it, and the numbers of masked tokens are many."""
    step = 1 << max(len(rows).bit_length() - 4, 0)
    missing = -len(rows) % step
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
