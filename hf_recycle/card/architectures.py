"""What a model's architecture says about its task: the class that loads it, and the Hub's name of what it does."""

from dataclasses import dataclass

from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class Task:
    """A task as transformers and the Hub name it; `tag` is ours."""

    auto_class: str
    pipeline: str | None
    tag: str | None
    words: str


_TASKS = (
    ("MASKED_LM", Task("AutoModelForMaskedLM", "fill-mask", "masked-lm", "masked language modelling")),
    ("CAUSAL_LM", Task("AutoModelForCausalLM", "text-generation", "causal-lm", "causal language modelling")),
    ("SEQ_TO_SEQ_CAUSAL_LM", Task("AutoModelForSeq2SeqLM", None, "seq2seq-lm", "sequence-to-sequence modelling")),
    (
        "SEQUENCE_CLASSIFICATION",
        Task("AutoModelForSequenceClassification", "text-classification", None, "sequence classification"),
    ),
    (
        "TOKEN_CLASSIFICATION",
        Task("AutoModelForTokenClassification", "token-classification", None, "token classification"),
    ),
    (
        "QUESTION_ANSWERING",
        Task("AutoModelForQuestionAnswering", "question-answering", None, "question answering"),
    ),
)
_OTHER = Task("AutoModel", None, None, "a task of its own")


def task_of(architecture: str | None) -> Task:
    """The task of a model class such as `BertForMaskedLM`; `AutoModel` and no pipeline for an unknown one."""
    for name, task in _TASKS:
        if architecture in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").values():
            return task
    return _OTHER
