"""Summed cross entropy whose backward pass needs one array of the logits' size."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_recycle.mlm.loss import IGNORED


def compact_loss(logits: Tensor, labels: Tensor, num_items: Tensor | float) -> Tensor:
    """`lm_loss` of the logits `(n, vocabulary)` of masked tokens alone, see `summed_cross_entropy`."""
    return summed_cross_entropy(logits, labels) / (num_items + (num_items == 0))


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the tokens whose label is not -100: a float32 scalar.

    As `F.cross_entropy(logits.float(), labels, reduction="sum")`, loss to the bit, gradients to rounding. The gradient
    takes the place of the log-probabilities, where torch fills two more arrays of that size; so the backward pass can
    be taken once, and itself has no derivative.

    Args:
        logits: `(n, vocabulary)`, any floating dtype.
        labels: int64 `(n,)`.
    """
    return _SummedCrossEntropy.apply(logits.float(), labels)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probabilities, labels)
        return F.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        log_probabilities, labels = ctx.saved_tensors
        weights = gradient * (labels != IGNORED)
        gradients = log_probabilities.exp_().mul_(weights[:, None])
        rows = torch.arange(len(labels), device=labels.device)
        gradients[rows, labels.clamp(min=0)] -= weights
        return gradients, None
