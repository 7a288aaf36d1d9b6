"""The models and batches that are measured, and the data they are fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.floor import Step

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Shape:
    """A BERT, as transformers has it with its default dropout, and its batches.

    Attributes:
        batch: sequences of one step.
        sequence: tokens of a sequence.
    """

    name: str
    layers: int
    d_model: int
    heads: int
    d_ff: int
    vocabulary: int = 30_522
    batch: int = 16
    sequence: int = 128

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.sequence

    def step(self) -> Step:
        """What a step of this model computes, for counting."""
        return Step(self.layers, self.d_model, self.d_ff, self.vocabulary, self.batch, self.sequence)

    def model(self) -> PreTrainedModel:
        """A fresh model; its weights depend on torch's global random state."""
        return BertForMaskedLM(BertConfig(**self.sizes()))

    def sizes(self) -> dict[str, Any]:
        """Settings of a configuration."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.sequence,
        }

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable:
        """The stock collator of the task."""
        return DataCollatorForLanguageModeling(tokenizer)

    def __str__(self) -> str:
        return (
            f"{self.layers} layers × {self.d_model}, d_ff {self.d_ff:,}, vocabulary {self.vocabulary:,}, "
            f"batch {self.batch} × {self.sequence}"
        )


@dataclass(frozen=True)
class CausalShape(Shape):
    """A Llama with tied embeddings, and its batches."""

    def model(self) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(**self.sizes(), tie_word_embeddings=True, pad_token_id=_SPECIAL.index("[PAD]"))
        )

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable:
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)


MEDIUM = Shape("BERT Medium", layers=8, d_model=512, heads=8, d_ff=2048)
SMALL = Shape("4 layers × 256", layers=4, d_model=256, heads=4, d_ff=1024)
CAUSAL = CausalShape("Llama of 4 layers × 256", layers=4, d_model=256, heads=4, d_ff=768, vocabulary=50_257)
CAUSAL_TINY = CausalShape("quick", layers=2, d_model=64, heads=2, d_ff=192, vocabulary=16_384, batch=8, sequence=64)
TINY = Shape("quick", layers=2, d_model=64, heads=2, d_ff=256, vocabulary=2048, batch=8, sequence=64)
GPU_MEDIUM = Shape("BERT Medium", layers=8, d_model=512, heads=8, d_ff=2048, batch=256)


def bench_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of that many made-up words: collators ask for its size and its special tokens."""
    words = {word: number for number, word in enumerate((*_SPECIAL, *(f"w{n}" for n in range(5, vocabulary))))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def packed_dataset(shape: Shape, sequences: int, seed: int = 0) -> datasets.Dataset:
    """Full sequences of random tokens with the columns that `run_mlm.py` gives its Trainer.

    What a step costs does not depend on which tokens it sees.
    """
    ids = np.random.default_rng(seed).integers(len(_SPECIAL), shape.vocabulary, (sequences, shape.sequence))
    ids[:, 0], ids[:, -1] = _SPECIAL.index("[CLS]"), _SPECIAL.index("[SEP]")
    ends = np.zeros_like(ids)
    ends[:, [0, -1]] = 1
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "token_type_ids": np.zeros_like(ids).tolist(),
            "attention_mask": np.ones_like(ids).tolist(),
            "special_tokens_mask": ends.tolist(),
        }
    )
