"""A tiny BERT with the tokenizer of a tiny text, as a folder that commands take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from hf_recycle.data.tokenizer import trained_tokenizer

TEXT = "".join(
    f"the {a} {b} jumps over the lazy {c} .\n"
    for a in ("red", "quick", "brown")
    for b in ("fox", "cat", "owl")
    for c in ("dog", "cow", "pig")
)
SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 16}


def save_text_model(parent: Path, change: Callable[[BertForMaskedLM], Any] = lambda model: None, **config: Any) -> Path:
    """Saves `parent/model` and `parent/text.txt`, after a change of the model; returns the model's folder."""
    tokenizer = trained_tokenizer([TEXT], 256, 16)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES | config))
    with torch.no_grad():
        change(model)
    model.save_pretrained(parent / "model")
    tokenizer.save_pretrained(parent / "model")
    (parent / "text.txt").write_text(TEXT)
    return parent / "model"
