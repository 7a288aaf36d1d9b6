"""What a Trainer does differently for language models: loss, head and evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DynamoBackend, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from hf_recycle.batches.loaders import base_loader
from hf_recycle.internals.of_torch import may_be_dynamic
from hf_recycle.mlm.capacity import CountingCollator, counted, masked_tokens, padded_count
from hf_recycle.mlm.chunked_head import ChunkedHead, find_chunked_head
from hf_recycle.mlm.cross_entropy import compact_loss
from hf_recycle.mlm.heads import MaskedHead, find_masked_head
from hf_recycle.mlm.loss import IGNORED, lm_loss, padded_positions, target_positions, token_losses
from hf_recycle.mlm.plain_loss import (
    core_model,
    honours_item_count,
    ignores_item_count,
    is_masked_language_model,
)
from hf_recycle.mlm.tally import EvaluationTally
from hf_recycle.mlm.tasks import Task, task_of
from hf_recycle.trainer.data import ReproducibleDataMixin

logger = logging.get_logger(__name__)


class LanguageModelingMixin(ReproducibleDataMixin):
    """Reproducible batches, a loss over the targets of the whole batch, the head of a masked language model on masked
    positions and that of a causal one in chunks, and evaluation over all targets.

    Loss, head and evaluation are ours only where that changes no loss of the user's: for models that are known to
    compute plain masked or causal cross entropy (`plain_loss.py`), and where no subclass overrides `compute_loss` and
    there is neither a `compute_loss_func` nor label smoothing. Everything else trains and evaluates as with the stock
    Trainer.

    Why a loss of our own: the forward of BERT and its kin takes `**kwargs` but ignores `num_items_in_batch`, so the
    stock Trainer believes the loss to be normalised over accumulated batches and processes when it is not. And it
    divides GPT-2's by all tokens, though the first of a sequence is predicted by none.
    """

    _task: Task | None = None
    """The task whose loss is ours; None where the loss is the user's or not known."""

    def set_up_language_modeling(self) -> None:
        """To be called once, at the end of `__init__`."""
        self._compiled = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self._head_model: nn.Module | None = None
        self._head: MaskedHead | ChunkedHead | None = None
        self._tally: EvaluationTally | None = None
        self._said_inflated = False
        self._stock_accepts_loss_kwargs = self._settled_accepts_loss_kwargs = self.model_accepts_loss_kwargs
        self.settle_loss()
        self.set_up_data()

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        loader = super()._get_dataloader(
            dataset, description, batch_size, sampler_fn, is_training=is_training, dataloader_key=dataloader_key
        )
        masked = self._wants_own_head and self._own_task.name == "mlm"
        if masked and self.accelerator.device.type != "cpu":  # on a CPU, counting waits for nothing
            base = base_loader(loader)
            base.collate_fn = CountingCollator(base.collate_fn)
        return loader

    # ---- Loss ----

    def settle_loss(self) -> None:
        """Works out whose loss it is: when a training begins, before the model is wrapped or sharded, and when an
        evaluation does, because until then a subclass or a script may have changed anything."""
        model = self._unwrapped_model()
        users = (
            self.steps_aside
            or type(self).compute_loss is not LanguageModelingMixin.compute_loss
            or "compute_loss" in vars(self)
            or self.compute_loss_func is not None
            or self.label_smoother is not None
            or self.loss_is_scaled_for_ga is False
            or self.get_sp_size() * self.get_cp_size() > 1  # sequences are cut, labels too
        )
        self._task = None if users else task_of(model)
        if self.model_accepts_loss_kwargs is not self._settled_accepts_loss_kwargs:
            return  # the user has set it
        if self._task is not None:
            # So that the stock Trainer counts the targets, and does not divide by accumulation steps once more.
            accepts = True
        else:
            accepts = self._stock_accepts_loss_kwargs and (users or not ignores_item_count(model))
        self.model_accepts_loss_kwargs = self._settled_accepts_loss_kwargs = accepts

    def loss_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of one batch of all processes, as in training: to be averaged over processes, not backpropagated."""
        items = self._get_num_items_in_batch([batch], self.args.device)
        inputs = self._prepare_inputs(send_to_device(counted(batch), self.args.device))
        with self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=items)

    def token_losses_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """The loss of each token of one batch, float32 `(batch, sequence)`, zero where nothing is predicted; None where
        the loss is not ours."""
        inputs = self._prepare_inputs(send_to_device(counted(batch), self.args.device))
        if not self._predicts(inputs):
            return None
        targets = self._own_task.targets(inputs["labels"])
        with self.compute_loss_context_manager():
            losses, _, positions = self._scores(model, inputs, targets)
        return losses.new_zeros(targets.numel()).index_put((positions,), losses).view_as(targets)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        if self._wants_own_head and labels is None and self._own_task.name == "mlm":
            raise ValueError(
                "masked_head=True needs labels, and the batches have none: pass a masking collator such as "
                "DataCollatorForLanguageModeling(tokenizer), make them in a compute_loss of your own, or set "
                "masked_head=False."
            )
        if not self._predicts(inputs):
            if num_items_in_batch is not None and model.training:
                self._say_if_inflated()
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        targets = self._own_task.targets(labels)
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        outputs = None
        if return_outputs:
            outputs = model(**inputs)  # with its own loss in them
            loss = lm_loss(_logits(outputs, with_loss=True), targets, items)
        else:
            loss = self._loss(model, inputs, targets, items)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Processes average their gradients; the sum over processes is wanted.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _predicts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the loss of a batch is ours; a causal model's is not where a collator has moved the labels itself."""
        return self._task is not None and inputs.get("labels") is not None and "shift_labels" not in inputs

    def _say_if_inflated(self) -> None:
        """Says once that a masked language model's loss is larger than it is believed to be, as with the stock Trainer.

        That is when the loss is a mean over its own batch, while the Trainer takes it for a sum divided by the masked
        tokens of all, which need not be divided by accumulation steps and has to be multiplied by processes."""
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        factor = processes * self.args.gradient_accumulation_steps
        believed = self.model_accepts_loss_kwargs and self.compute_loss_func is None and self.label_smoother is None
        if self._said_inflated or factor == 1 or not believed or self.loss_is_scaled_for_ga is False:
            return
        self._said_inflated = True
        model = self._unwrapped_model()
        if is_masked_language_model(model) and not honours_item_count(model):
            logger.warning(
                f"The loss and the gradients of {type(model).__name__} are {factor} times too large, as with "
                "transformers' Trainer, unless its forward divides the loss by num_items_in_batch: it takes **kwargs, "
                "so the Trainer neither divides by gradient_accumulation_steps nor averages over processes. Set "
                "model.accepts_loss_kwargs = False before the trainer is made."
            )

    # ---- Head ----

    @property
    def _own_task(self) -> Task:
        assert self._task is not None, "asked where the loss is ours"
        return self._task

    @property
    def _own_head_is_on(self) -> bool:
        """Whether the arguments ask for a head that computes less, or less at once, than the model's own."""
        task = self._task or task_of(self._unwrapped_model())
        # Scripts that turn masked_head off want the model's own head, of a causal model too.
        causal = task is not None and task.name == "clm"
        return self.args.masked_head and (self.args.chunked_head or not causal)

    @property
    def _wants_own_head(self) -> bool:
        return self._task is not None and self._own_head_is_on

    def _loss(self, model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, items: Tensor | int) -> Tensor:
        """The loss of one batch, by a head of ours if the model can."""
        if isinstance(head := self._own_head(), ChunkedHead):
            with head.at(targets):
                total = _logits(model(**_without_labels(inputs)))
            if total.dim() == 0:
                return total / (items + (items == 0))
            self._give_up_own_head(f"its head gave logits of shape {tuple(total.shape)}")
        logits, targets = self._predict(model, inputs, targets)
        return (compact_loss if logits.dim() == 2 else lm_loss)(logits, targets, items)

    def _scores(self, model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss at each target of one batch, the token that is predicted there, and where: all `(n,)`."""
        positions = target_positions(targets)
        if isinstance(head := self._own_head(), ChunkedHead):
            with head.at(targets, scores=True):
                scores = _logits(model(**_without_labels(inputs)))
            if scores.shape == (2, targets.numel()):
                return *scores[:, positions], positions
            self._give_up_own_head(f"its head gave logits of shape {tuple(scores.shape)}")
        logits, _ = self._predict(model, inputs, targets)
        logits = logits[: len(positions)] if logits.dim() == 2 else logits.flatten(0, -2)[positions]
        return token_losses(logits, targets.reshape(-1)[positions]), logits.argmax(-1), positions

    def _predict(self, model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their targets: of the masked positions only, `(n, vocabulary)` and `(n,)`, ascending, with padding
        behind them, if the model can; else of all, `(batch, sequence, vocabulary)` and `(batch, sequence)`."""
        inputs = _without_labels(inputs)
        head = self._own_head()
        if head is None:
            return _logits(model(**inputs)), targets
        assert isinstance(head, MaskedHead), "a head in chunks gives losses"
        positions, chosen, padding = self._choose_positions(targets)
        with head.at(positions, padding):
            logits = _logits(model(**inputs))
        if logits.shape[:-1] != positions.shape:
            self._give_up_own_head(f"its head gave logits of shape {tuple(logits.shape)}")
            return self._predict(model, inputs, targets)
        return logits, chosen

    def _choose_positions(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The positions at which to compute the head, their targets, and which of them are padding, if any can be."""
        masked = masked_tokens(labels)
        if not self._compiled:
            return *padded_positions(labels, masked), None
        share = getattr(self.data_collator, "mlm_probability", None)
        size = None
        if isinstance(share, int | float) and 0 <= share <= 1:
            size = padded_count(masked, labels.numel(), share)
        # Sizes 0 and 1 are never dynamic.
        positions, targets = padded_positions(labels, max(masked, 2) if size is None else size)
        padding = targets == IGNORED
        if size is None:
            may_be_dynamic(positions, 0)
            may_be_dynamic(padding, 0)
        return positions, targets, padding

    def head_attached(self) -> AbstractContextManager:
        """Within the context, a backward pass may compute parts of the forward pass of `compute_loss` again."""
        head = self._own_head() if self._task is not None else None
        return head.attached() if isinstance(head, MaskedHead) else nullcontext()

    def _own_head(self) -> MaskedHead | ChunkedHead | None:
        """The head of the current model, or None: not wanted, or the model can't (said once)."""
        if not self._own_head_is_on:
            return None
        model = core_model(self._unwrapped_model())
        if self._head_model is not model:  # model_init makes a new one
            self._head_model = model
            if self._own_task.name == "mlm":
                self._head = find_masked_head(model)
                why = "its head is not known to work position by position"
            else:
                self._head, why = self._find_chunked_head(model)
            if self._head is None:
                self._give_up_own_head(why)
        return self._head

    def _find_chunked_head(self, model: nn.Module) -> tuple[ChunkedHead | None, str]:
        """The head of a causal model in chunks, or None and the reason."""
        if self._compiled:
            return None, "torch_compile compiles the whole of it"
        if self.accelerator.mixed_precision == "fp16":
            return None, "fp16 scales the loss, and its gradients would be taken before"
        if self.get_tp_size() > 1:
            return None, "tensor parallelism has cut it"
        return find_chunked_head(model), "its logits are changed on their way to the loss, or its head is no nn.Linear"

    def _give_up_own_head(self, why: str) -> None:
        self._head = None
        causal = self._own_task.name == "clm"
        name, how = ("chunked_head", "in chunks") if causal else ("masked_head", "on masked positions only")
        logger.warning(
            f"{name}: {type(self._head_model).__name__} can't compute its head {how} ({why}); "
            "the full head is used, which is slower and otherwise the same."
        )

    # ---- Evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if not self.is_in_train:
            self.settle_loss()
        with self._tallying() as tally, self._noting_metrics() as users:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if tally is not None and tally.tokens:
            # A mean over all targets; the stock loop takes a mean of batch means.
            for name, value in tally.metrics(with_accuracy=self.compute_metrics is None).items():
                key = f"{metric_key_prefix}_{name}"
                if name not in users and key not in users:
                    output.metrics[key] = value
        return output

    @contextmanager
    def _tallying(self) -> Iterator[EvaluationTally | None]:
        """A sum over targets, where losses are ours and no subclass has steps of its own."""
        ours = self._task is not None and type(self).prediction_step is LanguageModelingMixin.prediction_step
        before, self._tally = self._tally, EvaluationTally(self.accelerator) if ours else None
        try:
            yield self._tally
        finally:
            self._tally = before

    @contextmanager
    def _noting_metrics(self) -> Iterator[set[str]]:
        """The names of what the user's `compute_metrics` returns."""
        names: set[str] = set()
        compute = self.compute_metrics

        def noting(*args, **kwargs):
            metrics = compute(*args, **kwargs) if compute is not None else {}
            names.update(metrics or ())
            return metrics

        self.compute_metrics = compute and noting
        try:
            yield names
        finally:
            self.compute_metrics = compute

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._tally is None or not self._predicts(inputs) or "logits" in (ignore_keys or ()):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if not prediction_loss_only:
            # The caller wants the logits of all positions, so the full head it is.
            loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys=ignore_keys)
            scores = logits[0] if isinstance(logits, tuple | list) else logits
            assert scores is not None
            assert labels is not None
            targets = self._own_task.targets(labels)
            positions = target_positions(targets)
            scores = scores.flatten(0, -2)[positions]
            losses = token_losses(scores, targets.reshape(-1)[positions])
            self._tally.add(losses, scores.argmax(-1), targets, positions)
            return loss, logits, labels
        inputs = self._prepare_inputs(inputs)
        targets = self._own_task.targets(inputs["labels"])
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, predictions, positions = self._scores(model, inputs, targets)
        return self._tally.add(losses, predictions, targets, positions), None, None


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def _logits(outputs: Any, with_loss: bool = False) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[1 if with_loss else 0]
