"""The causal language models of transformers whose loss is plain, by what becomes of the logits before it.

All of them call the model's `loss_function`, which divides by `num_items_in_batch`. A test reads their forward in the
installed transformers again, so that an upgrade that changes one fails there.
"""

_DIRECT = """
AXK1 AXK2 Afmoe Apertus Arcee AriaText BailingHybrid BigBird BioGpt BitNet Bloom Camembert CodeGen Cwm Data2VecText
DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV4 DiffLlama Doge Dots1 Electra Emu3 Ernie Ernie4_5 Ernie4_5_Moe Exaone4
ExaoneMoe Falcon FalconMamba FlexOlmo Flint GPTBigCode GPTJ GPTNeo GPTNeoX GPTNeoXJapanese Gemma Glm Glm4 Glm4Moe
Glm4MoeLite GlmMoeDsa GptOss HYV3 HYV4 Helium HrmText HunYuanDenseV1 HunYuanMoEV1 Jais2 Jamba JetMoe Kolibri1 Laguna
Lfm2 Lfm3 Llama Llama4 Mamba Mamba2 MegatronBert Mellum MiniCPM3 MiniMax MiniMaxM2 MiniMaxM3VL Ministral Ministral3
Mistral Mixtral Mllama ModernBertDecoder Moshi Mpt Nemotron NemotronH OPT Olmo Olmo2 Olmo3 OlmoHybrid Olmoe Persimmon
Phi Phi3 Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe Qwen4Exp RemBert RoCBert RoFormer Roberta
RobertaPreLayerNorm Rwkv SeedOss SmolLM3 SolarOpen StableLm Starcoder2 XGLM XLMRoberta XLMRobertaXL Youtu Zamba Zamba2
"""
_ODD_NAMES = {
    "BertGenerationDecoder",
    "BertLMHeadModel",
    "CTRLLMHeadModel",
    "GPT2LMHeadModel",
    "OpenAIGPTLMHeadModel",
}
LOGITS_OF_THE_HEAD = frozenset({*(f"{family}ForCausalLM" for family in _DIRECT.split()), *_ODD_NAMES})
"""Classes whose output layer gives the logits that go into the loss."""

_CHANGED = """
Cohere Cohere2 FalconH1 Gemma2 Gemma3 Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HyperCLOVAX NanoChat
RecurrentGemma VaultGemma
"""
CHANGED_LOGITS = frozenset(f"{family}ForCausalLM" for family in _CHANGED.split())
"""Classes that cap or scale what the output layer gives before it goes into the loss."""
