"""What a Trainer does differently for masked language models: loss and evaluation."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_recycle.mlm.capacity import MASKED_TOKENS, CountingCollator, usual_size
from hf_recycle.mlm.cross_entropy import compact_loss
from hf_recycle.mlm.data import ReproducibleDataMixin
from hf_recycle.mlm.heads import find_masked_head, is_masked_language_model
from hf_recycle.mlm.loaders import base_loader
from hf_recycle.mlm.loss import IGNORED, masked_lm_loss, masked_positions, padded_positions
from hf_recycle.mlm.random_state import OwnRandomState, generators_of
from hf_recycle.mlm.tally import EvaluationTally
from hf_recycle.second_pass import SecondPass

logger = logging.get_logger(__name__)


class MaskedLanguageModelingMixin(ReproducibleDataMixin):
    """Reproducible batches, a loss over the masked tokens of the whole batch, the head on masked positions, and
    evaluation over all masked tokens.

    The loss and the evaluation switch themselves on for masked language models only, and only where the user gave no
    loss of their own (`compute_loss_func`, label smoothing). Other models keep the stock Trainer's.

    Why a loss of our own: the forward of BERT and its kin takes `**kwargs` but ignores `num_items_in_batch`, so the
    stock Trainer believes the loss to be normalised over accumulated batches and processes when it is not.
    """

    def set_up_masked_language_modeling(self, *, masked_head: bool, deterministic_masking: bool, seed: int) -> None:
        """To be called once, at the end of `__init__`."""
        self.is_masked_language_model = is_masked_language_model(self.accelerator.unwrap_model(self.model))
        self._own_loss = (
            self.is_masked_language_model and self.compute_loss_func is None and self.label_smoother is None
        )
        if self._own_loss:
            # So that the stock Trainer counts the masked tokens, and does not divide by accumulation steps once more.
            self.model_accepts_loss_kwargs = True
        self._masked_head_wanted = masked_head and self._own_loss
        self._compiled = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self._head_model: nn.Module | None = None
        self._head = None
        self._tally: EvaluationTally | None = None
        self.set_up_data(deterministic=deterministic_masking)

    def can_sum_sparsely(self) -> bool:
        """Whether `sparse_tied_gradient` holds: every loss goes through the head, and one process on a CPU sums."""
        own_loss = self._masked_head_wanted and type(self).compute_loss is MaskedLanguageModelingMixin.compute_loss
        alone = self.accelerator.distributed_type == DistributedType.NO and self.accelerator.device.type == "cpu"
        return own_loss and alone and not self._compiled

    # ---- Data ----

    def _get_dataloader(self, dataset, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if self._masked_head_wanted and not self._is_dispatched(dataset):
            base = base_loader(loader)
            base.collate_fn = CountingCollator(base.collate_fn)
        return loader

    def _is_dispatched(self, dataset) -> bool:
        """Whether process 0 loads the batches of all, which joins and slices tensors and takes nothing else."""
        chosen = self.accelerator.dispatch_batches
        return isinstance(dataset, IterableDataset) if chosen is None else chosen

    def _prepare_inputs(self, inputs):
        if isinstance(inputs, Mapping) and MASKED_TOKENS in inputs:
            # It goes with the labels from here on: a model must not get it, and other labels have another number.
            inputs = dict(inputs)
            masked = inputs.pop(MASKED_TOKENS)
            inputs = super()._prepare_inputs(inputs)
            inputs["labels"].masked_tokens = masked
            return inputs
        return super()._prepare_inputs(inputs)

    def check_labels(self) -> None:
        """Refuses, before training, batches without labels, on which `masked_head` can't work.

        Raises:
            ValueError: if the collator makes no labels of the first training example.
        """
        is_stream = isinstance(self.train_dataset, IterableDataset) or not has_length(self.train_dataset)
        if not self._masked_head_wanted or is_stream or not len(self.train_dataset):
            return
        dataset, collator = self.train_dataset, copy.copy(self.data_collator)  # the stock one makes itself a generator
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset)
        # Looking must not change what comes.
        with OwnRandomState(0, [*generators_of(dataset), *generators_of(collator)]):
            batch = collator([dataset[0]])
        self._require_labels(batch)

    def second_pass(self, seed: int) -> SecondPass:
        extra = super().second_pass(seed)
        if self._masked_head_wanted:
            extra.collator = CountingCollator(extra.collator)
        return extra

    def _require_labels(self, batch: Mapping[str, Any]) -> None:
        if "labels" not in batch:
            raise ValueError(
                "masked_head=True needs labels, and the batches have none: pass a masking collator such as "
                "DataCollatorForLanguageModeling(tokenizer), or set masked_head=False."
            )

    # ---- Loss ----

    def loss_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of one batch of all processes, as in training: to be averaged over processes, not backpropagated."""
        items = self._get_num_items_in_batch([batch], self.args.device)
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=items)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._own_loss or (not self._masked_head_wanted and "labels" not in inputs):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        logits, targets, outputs = self._predict_masked(model, inputs, masked_head=not return_outputs)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        loss_of_logits = compact_loss if logits.dim() == 2 else masked_lm_loss
        loss = loss_of_logits(logits, targets, num_items_in_batch)
        if self.args.average_tokens_across_devices:
            # Processes average their gradients; the sum over processes is wanted.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _predict_masked(
        self, model: nn.Module, inputs: Mapping[str, Any], masked_head: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """Logits `(..., vocabulary)`, their targets `(...)` and the model's outputs: of the masked positions only,
        ascending, with padding behind them, if `masked_head` and the model can, else of all."""
        self._require_labels(inputs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        head = self._masked_head() if masked_head else None
        if head is None:
            outputs = model(**inputs)
            return _logits(outputs), labels, outputs
        positions, targets, padding = self._choose_positions(labels)
        with head.at(positions, padding):
            outputs = model(**inputs)
        logits = _logits(outputs)
        if logits.shape[:-1] != positions.shape:
            self._give_up_masked_head(f"its head gave logits of shape {tuple(logits.shape)}")
            return self._predict_masked(model, {**inputs, "labels": labels}, masked_head=False)
        return logits, targets, outputs

    def _choose_positions(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The positions at which to compute the head, their targets, and which of them are padding, if any can be."""
        masked = getattr(labels, "masked_tokens", None)
        if masked is None:  # a dispatched batch, or labels that a subclass made; on an accelerator this waits
            masked = int((labels != IGNORED).sum())
        if not self._compiled:
            return *padded_positions(labels, masked), None
        share = getattr(self.data_collator, "mlm_probability", None)
        known = isinstance(share, int | float) and 0 <= share <= 1
        size = usual_size(masked, labels.numel(), share) if known else None
        # Sizes 0 and 1 are never dynamic.
        positions, targets = padded_positions(labels, max(masked, 2) if size is None else size)
        padding = targets == IGNORED
        if size is None:
            torch._dynamo.maybe_mark_dynamic(positions, 0)
            torch._dynamo.maybe_mark_dynamic(padding, 0)
        return positions, targets, padding

    def _masked_head(self):
        """The head of the current model, or None: not wanted, or the model can't (said once)."""
        if not self._masked_head_wanted:
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._head_model is not model:  # model_init makes a new one
            self._head_model, self._head = model, find_masked_head(model)
            if self._head is None:
                self._give_up_masked_head("its head is not known to work position by position")
        return self._head

    def _give_up_masked_head(self, why: str) -> None:
        self._masked_head_wanted = False
        if self._head is not None:
            self._head.remove()
        logger.warning(
            f"masked_head: {type(self._head_model).__name__} can't compute its head on masked positions only ({why}); "
            "the full head is used, which is slower and otherwise the same."
        )

    # ---- Evaluation ----

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        with self._tallying() as tally:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        if tally is not None and tally.tokens:
            # A mean over all masked tokens; the stock loop takes a mean of batch means.
            metrics = tally.metrics(with_accuracy=self.compute_metrics is None)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    @contextmanager
    def _tallying(self) -> Iterator[EvaluationTally | None]:
        before, self._tally = self._tally, EvaluationTally(self.accelerator) if self._own_loss else None
        try:
            yield self._tally
        finally:
            self._tally = before

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._tally is None or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if not prediction_loss_only:
            # The caller wants the logits of all positions, so the full head it is.
            loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys=ignore_keys)
            scores = logits[0] if isinstance(logits, tuple | list) else logits
            positions = masked_positions(labels)
            self._tally.add(scores.flatten(0, -2)[positions], labels, positions)
            return loss, logits, labels
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits, _, _ = self._predict_masked(model, inputs, masked_head=True)
        positions = masked_positions(inputs["labels"])
        logits = logits[: len(positions)] if logits.dim() == 2 else logits.flatten(0, -2)[positions]
        return self._tally.add(logits, inputs["labels"], positions), None, None


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
