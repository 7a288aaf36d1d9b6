"""Sums over all masked tokens of an evaluation."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_recycle.mlm.loss import IGNORED, token_losses


class EvaluationTally:
    """Loss and accuracy over the masked tokens of all batches of all processes, each sample counted once.

    Attributes:
        tokens: masked tokens so far.
    """

    def __init__(self, accelerator: Accelerator):
        # Here, because evaluate takes seconds to import and most of a training does not need it.
        from hf_recycle.mlm.metric import MaskedAccuracy

        self._accelerator = accelerator
        self._loss = 0.0
        self._accuracy = MaskedAccuracy()
        self.tokens = 0

    def add(self, logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Adds a batch; returns the mean loss over its masked tokens, a scalar.

        Args:
            logits: `(n, vocabulary)` at the masked positions.
            labels: int64 `(batch, sequence)`, -100 where nothing is masked.
            positions: int64 `(n,)`, the masked positions in the flattened labels.
        """
        targets = labels.reshape(-1)[positions]
        losses = token_losses(logits, targets)
        rows = positions // labels.shape[-1]
        # By sample, so that the samples which pad the last batch of several processes can be taken off again.
        sums = losses.new_zeros(labels.shape[0], dtype=torch.float64).index_add_(0, rows, losses.double())
        predictions = torch.full_like(labels, IGNORED)
        predictions.view(-1)[positions] = logits.argmax(-1)

        sums = self._accelerator.gather_for_metrics(sums)
        predictions, references = (
            self._accelerator.gather_for_metrics(
                self._accelerator.pad_across_processes(values, dim=1, pad_index=IGNORED)
            )
            for values in (predictions, labels)
        )
        masked = references != IGNORED
        self._loss += float(sums.sum())
        self.tokens += int(masked.sum())
        if masked.any():
            self._accuracy.add_batch(
                predictions=predictions[masked].cpu().numpy(), references=references[masked].cpu().numpy()
            )
        return losses.sum() / max(len(losses), 1)

    def metrics(self, *, with_accuracy: bool) -> dict[str, float]:
        """Mean loss in nats per masked token, perplexity, and the share of masked tokens predicted exactly."""
        loss = self._loss / self.tokens
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if with_accuracy:
            metrics |= self._accuracy.compute() or {}
        return metrics
