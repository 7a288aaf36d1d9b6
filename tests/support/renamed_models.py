"""Tiny models of families whose files bear the names of their modules, and of those whose files don't."""

import torch
import transformers
from torch import nn

from support.tiny_runs import VOCABULARY

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
EXPERTS = {"num_key_value_heads": 1, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}

# The model, its configuration, and whether its files bear names or hold tensors that it hasn't.
FAMILIES = {
    "esm": ("EsmForMaskedLM", TEXT | {"mask_token_id": 4, "position_embedding_type": "rotary"}, True),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT | {"bos_token_id": 1, "eos_token_id": 2}, True),
    "nomic_bert": ("NomicBertForMaskedLM", TEXT, True),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        TEXT | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
        True,
    ),
    "mixtral": ("MixtralForCausalLM", TEXT | EXPERTS | {"num_local_experts": 4}, True),
    "vit": ("ViTForImageClassification", SIZES | {"image_size": 16, "patch_size": 8}, True),
    "bert": ("BertForMaskedLM", TEXT, False),
    "albert": ("AlbertForMaskedLM", TEXT | {"embedding_size": 8}, False),
    "t5": ("T5ForConditionalGeneration", T5 | {"vocab_size": VOCABULARY}, False),
}


def build(name: str, seed: int) -> nn.Module:
    head, config, _ = FAMILIES[name]
    cls = getattr(transformers, head)
    torch.manual_seed(seed)
    return cls(cls.config_class(**config))
