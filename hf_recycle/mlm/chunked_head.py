"""The head of a causal language model, computed a chunk of tokens at a time.

A causal model predicts every token, so its logits, tokens x vocabulary, are often the largest array of a training, and
three of them are alive at the end of the forward pass. The loss is a sum over tokens: it can as well be taken chunk by
chunk, the gradients of the head's input and weights with it, and the logits of a chunk forgotten. The loss and the
gradients are the same but for the order of sums; memory is that of one chunk.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_recycle.mlm.loss import IGNORED
from hf_recycle.mlm.plain_loss import comes_with_a_library, feeds_its_head_to_the_loss, is_untouched
from hf_recycle.speed.host_memory import give_back_freed_memory
from hf_recycle.utils.forwards import Forward

_LOGITS = 2**23
"""Logits of a chunk: 32 MiB in float32. Smaller chunks are no faster, larger ones leave the caches."""

_ROWS = {"cpu": 64}
_ROWS_ELSEWHERE = 1024
"""Tokens of a chunk, at least: with fewer, adding its part to the gradient of the weights takes longer than computing
it."""


class ChunkedHead:
    """The output layer `head` of a model, which gives losses instead of logits within `at`."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = weakref.ref(head)

    @contextmanager
    def at(self, targets: Tensor, *, scores: bool = False) -> Iterator[None]:
        """Within the context, the `logits` of the model are the cross entropy of its tokens, summed: a float32 scalar.

        Args:
            targets: int64 `(batch, sequence)`, what each position predicts, -100 for nothing.
            scores: give the loss of each token and the token that is predicted instead, float32 `(2, batch *
                sequence)`, without gradients.

        Labels must not be given. Outside the context the model is as it was.
        """
        head: Any = self._head()
        before = vars(head).get("forward")
        head.forward = _LossOfChunks(head.forward, targets.reshape(-1), scores)
        try:
            yield
        finally:
            del head.forward
            if before is not None:
                head.forward = before


def find_chunked_head(model: nn.Module) -> ChunkedHead | None:
    """A `ChunkedHead` on the (unwrapped) causal language model; None where what its output layer gives is not known to
    be what its loss is computed from, where that layer is no plain `nn.Linear`, or where it is in float16: gradients
    that are taken before the loss is scaled would vanish."""
    if not feeds_its_head_to_the_loss(model):
        return None
    whole: Any = model
    head = whole.get_output_embeddings()
    # FSDP2 makes a class of its own of it, which computes the same.
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    plain = linear and comes_with_a_library(head) and is_untouched(head)
    return ChunkedHead(head) if plain and head.weight.dtype != torch.float16 else None


class _LossOfChunks(Forward):
    """The forward of the output layer within `ChunkedHead.at`."""

    def __init__(self, original, targets: Tensor, scores: bool) -> None:
        super().__init__(original)
        self._targets, self._scores = targets, scores

    def __call__(self, hidden: Tensor) -> Tensor:
        layer = self.own.__self__
        hidden, targets = hidden.flatten(0, -2), self._targets
        if self._scores:
            with torch.no_grad():
                return _scores(hidden, layer.weight, layer.bias, targets)
        if torch.is_grad_enabled():
            give_back_freed_memory(hidden.device)
        return summed_head_loss(hidden, layer.weight, layer.bias, targets)


def summed_head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The cross entropy of `F.linear(hidden, weight, bias)`, summed over the tokens: a float32 scalar.

    As `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")`, autocast included, loss and
    gradients to rounding. The gradients are computed with the loss, so the backward pass can be taken once, and itself
    has no derivative.

    Args:
        hidden: `(n, width)`, float32 or bfloat16.
        weight: `(vocabulary, width)`.
        bias: `(vocabulary,)` or None.
        targets: int64 `(n,)`; -100 is ignored.
    """
    return _SummedHeadLoss.apply(hidden, weight, bias, targets, torch.is_grad_enabled())


class _SummedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, train: bool) -> Tensor:
        needed = [train and needed for needed in ctx.needs_input_grad[:3]]
        inputs = hidden, weight, bias
        # Sums over chunks are kept in float32, whatever the products are computed in.
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden, weight, bias = _as_computed(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in _chunks(hidden, weight, bias):
                chosen = targets[rows]
                log_probabilities = torch.log_softmax(logits, dim=-1)
                del logits
                total += F.nll_loss(log_probabilities, chosen, ignore_index=IGNORED, reduction="sum")
                if not any(needed):
                    continue
                gradient = _gradient_of_logits(log_probabilities, chosen)
                if of_bias is not None:
                    of_bias += gradient.sum(0)
                gradient = gradient.to(hidden.dtype)
                if of_hidden is not None:
                    of_hidden[rows] = gradient @ weight
                if of_weight is not None and of_weight.dtype == gradient.dtype:
                    of_weight.addmm_(gradient.T, hidden[rows])
                elif of_weight is not None:
                    of_weight += gradient.T @ hidden[rows]
        ctx.dtypes = [None if value is None else value.dtype for value in inputs]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if value is None else value.mul_(gradient.to(value.dtype)).to(dtype)
            for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    scores = torch.zeros((2, len(targets)), dtype=torch.float32, device=hidden.device)
    hidden, weight, bias = _as_computed(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in _chunks(hidden, weight, bias):
            scores[0, rows] = F.cross_entropy(logits, targets[rows], ignore_index=IGNORED, reduction="none")
            scores[1, rows] = logits.argmax(-1).float()
    return scores


def _as_computed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias of a linear layer as autocast would have them."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the tokens with their logits in float32."""
    size = max(_ROWS.get(hidden.device.type, _ROWS_ELSEWHERE), _LOGITS // len(weight))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        logits = F.linear(hidden[rows], weight, bias)
        yield rows, logits.float()


def _gradient_of_logits(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the summed cross entropy, in the place of the log-probabilities."""
    predicted = targets != IGNORED
    gradient = log_probabilities.exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return gradient.mul_(predicted[:, None])
