"""The two tasks of language models: what a model of each is, what it predicts, and from what it is trained.

Everything that depends on the task asks one of these objects. Loss, metrics and heads know targets only: for each
position the token that its logits predict, or -100.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_recycle.mlm.causal_batches import CausalCollator
from hf_recycle.mlm.loss import IGNORED
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.mlm.plain_loss import plain_loss_of


class Task(ABC):
    """A task of a language model.

    Attributes:
        name: as in the argument `task`.
        auto_class: the class of transformers that loads its models.
        predicted: what its loss is taken over, in words.
        tokenizer: what kind is trained on the corpus when none is named.
        first_predicted: the first token of a sequence that can be a target.
        predicts_special_tokens: whether special tokens can be targets.
    """

    name: ClassVar[str]
    auto_class: ClassVar[Any]
    predicted: ClassVar[str]
    tokenizer: ClassVar[Literal["wordpiece", "byte_bpe"]]
    first_predicted: ClassVar[int]
    predicts_special_tokens: ClassVar[bool]

    @abstractmethod
    def targets(self, labels: Tensor) -> Tensor:
        """What each position predicts.

        Args:
            labels: int64 `(batch, sequence)`, as the model takes them.

        Returns:
            int64 `(batch, sequence)`, -100 where nothing is predicted.
        """

    @abstractmethod
    def collator(self, tokenizer: Any, **masking: Any) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Makes batches of sequences with their labels. `masking` are options of `MaskedLanguageModelingCollator`; a
        task without masks has no use for them."""


class MaskedLanguageModeling(Task):
    name = "mlm"
    auto_class = AutoModelForMaskedLM
    predicted = "masked token"
    tokenizer = "wordpiece"
    first_predicted = 0
    predicts_special_tokens = False

    def targets(self, labels: Tensor) -> Tensor:
        return labels

    def collator(self, tokenizer: Any, **masking: Any) -> MaskedLanguageModelingCollator:
        return MaskedLanguageModelingCollator(tokenizer, **masking)


class CausalLanguageModeling(Task):
    name = "clm"
    auto_class = AutoModelForCausalLM
    predicted = "token"
    tokenizer = "byte_bpe"
    first_predicted = 1
    predicts_special_tokens = True

    def targets(self, labels: Tensor) -> Tensor:
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED)

    def collator(self, tokenizer: Any, **masking: Any) -> CausalCollator:
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return CausalCollator(padding or 0)


TASKS: dict[str, Task] = {task.name: task for task in (MaskedLanguageModeling(), CausalLanguageModeling())}


def task_of(model: nn.Module) -> Task | None:
    """The task whose plain loss the (unwrapped) `model` computes for certain; None for any other model."""
    name = plain_loss_of(model)
    return None if name is None else TASKS[name]
