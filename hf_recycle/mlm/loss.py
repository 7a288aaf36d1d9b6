"""Cross entropy over masked tokens, computed as transformers computes it."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForMaskedLMLoss

from hf_recycle.internals.of_torch import assert_on_device

IGNORED = -100
"""The label of a token that is not predicted."""


def target_positions(labels: torch.Tensor) -> torch.Tensor:
    """Indices of the tokens to predict in the flattened `labels`: int64 `(n,)`, ascending, on the same
    device."""
    return (labels.reshape(-1) != IGNORED).nonzero().squeeze(-1)


def padded_positions(labels: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked positions and their labels, padded to `size` without waiting for the device.

    Args:
        labels: int64, any shape.
        size: at least the number of masked tokens.

    Returns:
        `(positions, targets)`, both int64 `(size,)`: the positions as in `target_positions`, then 0; their labels, then
        -100, so that the padding adds exactly nothing to a loss and its gradients.

    Raises:
        RuntimeError: if `size` is too small (on an accelerator: as an error of the device, later).
    """
    labels = labels.reshape(-1)
    masked = labels != IGNORED
    assert_on_device(masked.sum() <= size, "labels changed after their masked tokens were counted")
    positions = masked.nonzero_static(size=size, fill_value=-1).squeeze(-1)
    padding = positions < 0
    positions = positions.masked_fill(padding, 0)
    return positions, labels[positions].masked_fill(padding, IGNORED)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token, unreduced: float32 `(n,)`, zero where the label is -100.

    Args:
        logits: `(..., vocabulary)`, any floating dtype, upcast to float32 as transformers does.
        labels: int64 `(...)`, n in all.
    """
    labels = labels.reshape(-1).to(logits.device)
    logits = logits.float().view(-1, logits.shape[-1])
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def lm_loss(logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | float) -> torch.Tensor:
    """Summed cross entropy over the masked tokens, divided by `num_items`: a float32 scalar.

    Args:
        logits: `(..., vocabulary)`, of all tokens or of the masked ones alone.
        labels: int64 `(...)`; -100 is ignored.
        num_items: what to divide by, as a rule the masked tokens of the whole global batch. Where it is 0
            nothing is masked anywhere, and the loss is 0 and not the NaN of a mean over nothing.

    On the CPU in float32, with `num_items` the masked tokens of these very labels, loss and gradients equal
    those of `nn.CrossEntropyLoss()` to the bit.
    """
    # Added rather than clamped: a share of the items, below one, is a legitimate divisor.
    num_items = num_items + (num_items == 0)
    items: Any = num_items  # declared a tensor there, and divided by alone
    return ForMaskedLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=items)
