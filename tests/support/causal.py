"""Tiny causal models and texts for them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from support.tiny_runs import VOCABULARY

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 0}


def llama(tied: bool = False) -> LlamaForCausalLM:
    set_seed(7)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def texts(n: int = 48, seed: int = 0) -> list[dict]:
    """Sequences of 4 to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]
