"""Sums over all predicted tokens of an evaluation."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_recycle.mlm.loss import IGNORED


class EvaluationTally:
    """Loss and accuracy over the targets of all batches of all processes, each sample counted once.

    Attributes:
        tokens: targets so far.
    """

    def __init__(self, accelerator: Accelerator):
        # Here, because evaluate takes seconds to import and most of a training does not need it.
        from hf_recycle.mlm.metric import MaskedAccuracy

        self._accelerator = accelerator
        self._loss = 0.0
        self._accuracy = MaskedAccuracy()
        self.tokens = 0

    def add(self, losses: Tensor, predictions: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        """Adds a batch; returns the mean loss over its targets, a scalar.

        Args:
            losses: float32 `(n,)` at the positions with a target.
            predictions: `(n,)`, the tokens predicted there.
            targets: int64 `(batch, sequence)`, -100 where nothing is predicted.
            positions: int64 `(n,)`, where in the flattened targets.
        """
        rows = positions // targets.shape[-1]
        # By sample, so that the samples which pad the last batch of several processes can be taken off again.
        sums = losses.new_zeros(targets.shape[0], dtype=torch.float64).index_add_(0, rows, losses.double())
        predicted = torch.full_like(targets, IGNORED)
        predicted.view(-1)[positions] = predictions.to(targets.dtype)

        sums = self._accelerator.gather_for_metrics(sums)
        predicted, references = (
            self._accelerator.gather_for_metrics(
                self._accelerator.pad_across_processes(values, dim=1, pad_index=IGNORED)
            )
            for values in (predicted, targets)
        )
        counted = references != IGNORED
        self._loss += float(sums.sum())
        self.tokens += int(counted.sum())
        if counted.any():
            self._accuracy.add_batch(
                predictions=predicted[counted].cpu().numpy(), references=references[counted].cpu().numpy()
            )
        return losses.sum() / max(len(losses), 1)

    def metrics(self, *, with_accuracy: bool) -> dict[str, float]:
        """Mean loss in nats per predicted token, perplexity, and the share of them predicted exactly."""
        loss = self._loss / self.tokens
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if with_accuracy:
            metrics |= self._accuracy.compute() or {}
        return metrics
