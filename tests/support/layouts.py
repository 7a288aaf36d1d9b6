"""A tiny model of each layout of feed-forward blocks that transformers has."""

from collections.abc import Callable

import transformers
from transformers import PreTrainedModel

from support import families

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 42}
IDS = {"vocab_size": 67, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
EXPERTS = {"num_key_value_heads": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
IMAGE = {"image_size": 16, "patch_size": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}

# Beside those of `families`: the class and its configuration.
MORE: dict[str, tuple[str, dict]] = {
    "ALBERT, two blocks in a group": (
        "AlbertForMaskedLM",
        WIDE | IDS | {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 8},
    ),
    "ConvBERT": ("ConvBertModel", WIDE | IDS | {"embedding_size": 8, "head_ratio": 1, "conv_kernel_size": 3}),
    "two blocks in one module": ("LiltModel", WIDE | IDS | {"hidden_size": 24}),
    "parallel to attention": (
        "FalconForCausalLM",
        SIZES | IDS | {"ffn_hidden_size": 42, "new_decoder_architecture": True, "num_kv_heads": 1},
    ),
    "experts and a shared one": (
        "Qwen2MoeForCausalLM",
        WIDE | IDS | EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    ),
    "experts of DeepSeek": (
        "DeepseekV3ForCausalLM",
        WIDE | IDS | EXPERTS
        | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "experts of Granite": (
        "GraniteMoeHybridForCausalLM",
        WIDE | IDS | MAMBA
        | {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "mamba_n_groups": 1}
        | {"shared_intermediate_size": 20, "layer_types": ["mamba", "attention"]},
    ),
    "experts of Jamba": (
        "JambaForCausalLM",
        WIDE | IDS
        | {"num_key_value_heads": 1, "num_experts": 3, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
    ),
    "experts of JetMoE": (
        "JetMoeForCausalLM",
        IDS | {"hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8}
        | {"intermediate_size": 42, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "vision": ("ViTModel", WIDE | IMAGE),
    "vision, stages": ("SwinModel", IMAGE | {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}),
    "vision, convolutions": (
        "PoolFormerModel",
        {"hidden_sizes": [16, 24], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2]}
        | {"padding": [2, 1]},
    ),
    "audio": (
        "Wav2Vec2Model",
        WIDE
        | {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
    ),
    "audio, encoder and decoder": (
        "WhisperModel",
        SIDES | {name: value for name, value in IDS.items() if "position" not in name}
        | {"d_model": 16, "encoder_ffn_dim": 42, "decoder_ffn_dim": 30, "num_mel_bins": 8, "max_source_positions": 16}
        | {"max_target_positions": 16, "decoder_start_token_id": 1},
    ),
    "two towers": (
        "CLIPModel",
        {"text_config": WIDE | IDS, "vision_config": SIZES | IMAGE | {"intermediate_size": 30}, "projection_dim": 8},
    ),
}  # fmt: skip

FAMILIES = ("bert", "modernbert", "t5-gated", "gpt2", "squeezebert", "phi3", "opt", "mixtral", "gpt_oss", "switch")


def _builder(name: str, config: dict) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        cls = getattr(transformers, name)
        made = cls.config_class(**config)
        made._experts_implementation = "eager"  # grouped matrix products need rows of whole 16 bytes
        return cls(made)

    return build


LAYOUTS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: families.BY_NAME[name].build for name in FAMILIES},
    **{name: _builder(*given) for name, given in MORE.items()},
}
"""A new random model at each call, by what is special about it."""
