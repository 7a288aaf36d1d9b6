"""The loss of a language model on a text, always on the same sequences with the same masks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hf_recycle.analysis.checkpoint import Checkpoint
from hf_recycle.analysis.data_scores import ModelNeurons
from hf_recycle.analysis.source import Source
from hf_recycle.batches.numbered import Numbered
from hf_recycle.batches.seeded import EVALUATION_SEED, SeededCollator
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.data.loading import load_data
from hf_recycle.data.model import load_model, positions_needed
from hf_recycle.data.tokenizer import load_tokenizer
from hf_recycle.errors import UserError
from hf_recycle.internals.of_transformers import has_class_for
from hf_recycle.mlm.heads import find_masked_head
from hf_recycle.mlm.loss import IGNORED, target_positions, token_losses
from hf_recycle.mlm.tasks import TASKS, Task
from hf_recycle.neurons.blocks import FeedForward

Batch = dict[str, Tensor]

_LENGTH = 128


@dataclass(frozen=True)
class EvaluationSettings:
    """What the loss is measured on: the first `max_samples` sequences of `max_seq_length` tokens of a text file (None:
    128, or as many as the model has positions for), at most half of the text: criteria and folds look at what follows.

    Raises:
        UserError: a value out of its range, or a file that can't be read as text.
    """

    eval_file: str
    max_seq_length: int | None = None
    max_samples: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, value in (("max_eval_samples", self.max_samples), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.data(self.max_seq_length or _LENGTH)

    def length(self, config: PreTrainedConfig) -> int:
        """Tokens of a sequence for the model of this configuration."""
        if self.max_seq_length is not None:
            return self.max_seq_length
        positions = getattr(config, "max_position_embeddings", None) or _LENGTH
        return min(_LENGTH, positions - positions_needed(config, 0))

    def data(self, length: int) -> DataArguments:
        """The text as the data pipeline takes it, in sequences of `length` tokens."""
        # Both parts are the one file: the training part is not looked at.
        with _named_as_given():
            return DataArguments(
                train_file=self.eval_file,
                validation_file=self.eval_file,
                max_seq_length=length,
                max_eval_samples=2 * self.max_samples,
            )


@contextmanager
def _named_as_given() -> Iterator[None]:
    """What is said of `train_file` is said of `eval_file`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("train_file", "eval_file")) from error


@dataclass(frozen=True)
class LanguageModel:
    """A model with its batches: `loss()` measures it as it is now.

    Attributes:
        task: what its loss is taken over.
        batches: `input_ids`, `labels` and what else the forward takes, on the model's device.
        tokens: how many tokens are predicted.
        others: batches that the loss is not measured on, for criteria and folds to look at; empty: they look at
            `batches`.
    """

    model: PreTrainedModel
    task: Task
    batches: Sequence[Batch]
    tokens: int
    others: Sequence[Batch] = ()

    def loss(self) -> float:
        """Mean cross entropy of the predicted tokens in nats."""
        return sum(self.batch_losses()) / self.tokens

    @torch.inference_mode()
    def batch_losses(self) -> list[float]:
        """Cross entropy of the predicted tokens of each batch, summed, in nats."""
        return [float(self._losses(batch).sum(dtype=torch.float64)) for batch in self.batches]

    def batch_tokens(self) -> list[int]:
        """How many tokens of each batch are predicted."""
        return [predicted_tokens(self.task, batch) for batch in self.batches]

    def neurons(self, blocks: Sequence[FeedForward], seed: int = 0) -> ModelNeurons:
        """The neurons of some of its blocks, with batches to look at."""
        return ModelNeurons(
            self.model, blocks, self.others or self.batches, lambda _, batch: self._mean_loss(batch), seed
        )

    def _mean_loss(self, batch: Mapping[str, Any]) -> Tensor:
        return self._losses(batch).sum() / max(predicted_tokens(self.task, batch), 1)

    def _losses(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross entropies of tokens, zero for those that are not predicted, `(n,)`."""
        head = find_masked_head(self.model) if self.task.name == "mlm" else None
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets = self.task.targets(batch["labels"])
        if head is None:
            return token_losses(self.model(**inputs).logits, targets)
        positions = target_positions(targets)
        with head.at(positions):
            return token_losses(self.model(**inputs).logits, targets.flatten()[positions])


def load_language_model(
    source: Source, settings: EvaluationSettings, model: PreTrainedModel | None = None
) -> LanguageModel:
    """A model in evaluation mode, on a GPU if there is one, with the batches to measure it on.

    Args:
        model: it, if it is loaded already; else it is loaded in float32.

    Raises:
        UserError: it has no language modelling head, no tokenizer, or the text is too short.
    """
    config = Checkpoint(source).config
    task = _task(config, source)
    where, revision = (str(source.folder), "main") if source.folder else (source.name, source.revision or "main")
    length = settings.length(config)
    tokenizer = load_tokenizer(where, length, revision)
    if model is None:
        arguments = ModelArguments(model_name_or_path=where, model_revision=revision, task=task.name)
        model = load_model(arguments, tokenizer, length)
    with _named_as_given():
        sequences = load_data(settings.data(length), tokenizer)[1]
    assert isinstance(sequences, Dataset), "eval_file is given"
    rows = [sequences[index] for index in range(len(sequences))]
    measured = min(settings.max_samples, -(-len(rows) // 2))
    subject = language_model(
        model, task, rows[:measured], task.collator(tokenizer), settings.batch_size, rows[measured:]
    )
    if not subject.tokens:
        raise UserError(f"eval_file={settings.eval_file!r} gives no token to predict; pass a longer text")
    return subject


def language_model(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Any],
    collator: Callable[[Any], Batch],
    batch_size: int,
    others: Sequence[Any] = (),
) -> LanguageModel:
    """A model in evaluation mode, on a GPU if there is one, with batches of sequences.

    Args:
        rows: mappings with `input_ids`.
        collator: makes a batch of some of them, with its labels.
        others: as `rows`, for criteria and folds to look at.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    collate = SeededCollator(collator, EVALUATION_SEED)  # the masks of every evaluation

    def batches(rows: Sequence[Any], first: int) -> list[Batch]:
        numbered = [Numbered(0, first + number, row) for number, row in enumerate(rows)]
        made = [collate(numbered[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        return [{name: value.to(device) for name, value in batch.items()} for batch in made]

    measured = batches(rows, 0)
    tokens = sum(predicted_tokens(task, batch) for batch in measured)
    model.to(device)  # type: ignore[arg-type]  # transformers hides the signature
    return LanguageModel(model.eval(), task, measured, tokens, batches(others, len(rows)))


def predicted_tokens(task: Task, batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch its loss is taken over."""
    return int((task.targets(batch["labels"]) != IGNORED).sum())


def _task(config: PreTrainedConfig, source: Source) -> Task:
    architecture = (config.architectures or ["no architecture"])[0]
    if not config.is_encoder_decoder:
        causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
        if architecture in causal and has_class_for(TASKS["clm"].auto_class, config):
            return TASKS["clm"]
        heads = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}
        if (architecture in heads or architecture.endswith("ForPreTraining")) and (
            has_class_for(TASKS["mlm"].auto_class, config)
        ):
            return TASKS["mlm"]
    raise UserError(
        f"{source.name} is a {architecture}: a loss on a text needs a model with a masked or causal language modelling "
        "head, such as BertForMaskedLM or GPT2LMHeadModel"
    )
