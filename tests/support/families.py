"""A tiny random model of every family that must work, and what a reader of its source says of its blocks.

Nothing here asks `hf_recycle`: names, shapes and the place of each weight are written down by hand.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, D_MODEL, D_FF, LAYERS = 67, 16, 42, 2


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: for test ids.
        build: `build(d_model=, d_ff=, layers=)` gives a new random model, in evaluation mode.
        block_names: names of the blocks of a model of `LAYERS` layers, in order.
        ins: paths of the in-projections within a block.
        out: path of the out-projection within a block.
        fused: the one in-projection holds two halves.
        transposed: weights are (in, out), as in Conv1D.
        interleaved: of a fused in-projection, rows 2i and 2i + 1 are neuron i, rather than i and i + d_ff.
        experts: weights are parameters of all experts, of which a block's name ends in the number of one.
    """

    name: str
    build: Callable[..., transformers.PreTrainedModel]
    block_names: tuple[str, ...]
    ins: tuple[str, ...]
    out: str
    fused: bool = False
    transposed: bool = False
    seq2seq: bool = False
    interleaved: bool = False
    experts: bool = False

    @property
    def gated(self) -> bool:
        return self.fused or len(self.ins) == 2

    @property
    def roles(self) -> tuple[str, ...]:
        return ("gate", "up") if self.gated else ("in",)

    def inputs(self) -> dict[str, Tensor]:
        tokens = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
        return {"input_ids": tokens, **({"decoder_input_ids": tokens.flip(1)} if self.seq2seq else {})}

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs()).logits

    def matrices(self, model: nn.Module, block: str) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
        """In-projections `(d_ff, d_model)` each, their biases, and the out-projection `(d_model, d_ff)`: views."""
        weights, biases = [], []
        for path in self.ins:
            weight, bias = self._tensors(model, block, path)
            weights += self._halves(weight) if self.fused else [weight]
            biases += [None, None] if bias is None and self.fused else self._halves(bias) if self.fused else [bias]
        return weights, biases, self._tensors(model, block, self.out)[0]

    def _halves(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values[::2], values[1::2]) if self.interleaved else values.chunk(2)

    def holder(self, model: nn.Module, block: str) -> nn.Module:
        """The smallest module that holds the projections."""
        return model.get_submodule(block.rpartition(".")[0] if self.experts else block)

    def parameters(self, model: nn.Module, block: str) -> list[nn.Parameter]:
        """All that a neuron has a part in."""
        holder = self.holder(model, block)
        if self.experts:
            names = [name for path in self.ins for name in (path, f"{path}_bias") if hasattr(holder, name)]
            return [getattr(holder, name) for name in (*names, self.out)]
        ins = [holder.get_submodule(path) for path in self.ins]
        weights = [parameter for linear in ins for parameter in (linear.weight, linear.bias) if parameter is not None]
        return [*weights, holder.get_submodule(self.out).weight]

    def _tensors(self, model: nn.Module, block: str, path: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias of one projection."""
        holder = self.holder(model, block)
        if self.experts:
            expert = int(block.rpartition(".")[2])
            weight, bias = getattr(holder, path)[expert], getattr(holder, f"{path}_bias", None)
            bias = None if bias is None else bias[expert]
        else:
            weight, bias = holder.get_submodule(path).weight, holder.get_submodule(path).bias
        weight = weight.data.flatten(1)
        return weight.T if self.transposed else weight, None if bias is None else bias.data

    def neuron_parts(self, model: nn.Module, block: str, i: int) -> Iterator[tuple[str, Tensor]]:
        """(role, view) of everything that belongs to neuron `i`, taken from the matrices by hand."""
        weights, biases, out = self.matrices(model, block)
        for role, weight, bias in zip(self.roles, weights, biases, strict=True):
            yield role, weight[i]
            if bias is not None:
                yield f"{role}.bias", bias[i]
        yield "out", out[:, i]


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter, so that no bias is zero and no two layers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def _builder(head: str, names: str, **fixed) -> Callable[..., transformers.PreTrainedModel]:
    """`names`: the config's words for d_model, d_ff, layers and heads."""
    width, inner, depth, heads = names.split()

    def build(d_model: int = D_MODEL, d_ff: int = D_FF, layers: int = LAYERS) -> transformers.PreTrainedModel:
        cls = getattr(transformers, head)
        config = {width: d_model, inner: d_ff, depth: layers, heads: 2, "vocab_size": VOCABULARY, **fixed}
        if head.startswith("T5") or head.startswith("MT5"):
            config["d_kv"] = d_model // 2
        if head.startswith("SqueezeBert"):
            config["embedding_size"] = d_model
        config = cls.config_class(**config)
        config._experts_implementation = "eager"  # grouped matrix products need rows of whole 16 bytes
        return cls(config).eval()

    return build


_HF = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
_POSITIONS = {"max_position_embeddings": 32, "pad_token_id": 0}


def _layers(pattern: str, count: int = LAYERS) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


def _bert_like(name: str, head: str, prefix: str, **fixed) -> Family:
    build = _builder(head, _HF, **_POSITIONS, **fixed)
    return Family(name, build, _layers(f"{prefix}.encoder.layer.{{}}"), ("intermediate.dense",), "output.dense")


def _llama_like(name: str, head: str, **fixed) -> Family:
    build = _builder(head, _HF, num_key_value_heads=1, **_POSITIONS, **fixed)
    return Family(name, build, _layers("model.layers.{}.mlp"), ("gate_proj", "up_proj"), "down_proj")


_IN_RANGE = {"bos_token_id": 1, "eos_token_id": 2}


def _experts(name: str, head: str, pattern: str, **layout: bool) -> Family:
    """Three experts in every layer."""
    build = _builder(
        head, _HF, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, **_POSITIONS, **_IN_RANGE
    )
    names = tuple(pattern.format(i, expert) for i in range(LAYERS) for expert in range(3))
    return Family(name, build, names, ("gate_up_proj",), "down_proj", fused=True, experts=True, **layout)


def _t5_like(name: str, head: str, gated: bool) -> Family:
    build = _builder(
        head,
        "d_model d_ff num_layers num_heads",
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
    )
    blocks = _layers("encoder.block.{}.layer.1.DenseReluDense") + _layers("decoder.block.{}.layer.2.DenseReluDense")
    return Family(name, build, blocks, ("wi_0", "wi_1") if gated else ("wi",), "wo", seq2seq=True)


FAMILIES: tuple[Family, ...] = (
    _bert_like("bert", "BertForMaskedLM", "bert"),
    _bert_like("roberta", "RobertaForMaskedLM", "roberta"),
    _bert_like("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", "roberta_prelayernorm"),
    _bert_like("electra", "ElectraForMaskedLM", "electra", embedding_size=D_MODEL),
    _bert_like(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        "deberta",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    _bert_like("mpnet", "MPNetForMaskedLM", "mpnet"),
    _bert_like("esm", "EsmForMaskedLM", "esm", mask_token_id=4, token_dropout=False),
    Family(
        "distilbert",
        _builder("DistilBertForMaskedLM", "dim hidden_dim n_layers n_heads", **_POSITIONS),
        _layers("distilbert.transformer.layer.{}.ffn"),
        ("lin1",),
        "lin2",
    ),
    Family(
        "albert",
        _builder("AlbertForMaskedLM", _HF, embedding_size=8, **_POSITIONS),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0",),
        ("ffn",),
        "ffn_output",
    ),
    Family(
        "modernbert",
        _builder(
            "ModernBertForMaskedLM",
            _HF,
            mlp_bias=True,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            **_POSITIONS,
        ),
        _layers("model.layers.{}.mlp"),
        ("Wi",),
        "Wo",
        fused=True,
    ),
    _t5_like("t5-relu", "T5ForConditionalGeneration", gated=False),
    _t5_like("t5-gated", "T5ForConditionalGeneration", gated=True),
    _t5_like("mt5", "MT5ForConditionalGeneration", gated=True),
    Family(
        "gpt2",
        _builder("GPT2LMHeadModel", "n_embd n_inner n_layer n_head", bos_token_id=1, eos_token_id=2, n_positions=32),
        _layers("transformer.h.{}.mlp"),
        ("c_fc",),
        "c_proj",
        transposed=True,
    ),
    Family(
        "squeezebert",
        _builder(
            "SqueezeBertForMaskedLM",
            _HF,
            intermediate_groups=1,
            output_groups=1,
            q_groups=1,
            k_groups=1,
            v_groups=1,
            **_POSITIONS,
        ),
        _layers("transformer.encoder.layers.{}"),
        ("intermediate.conv1d",),
        "output.conv1d",
    ),
    _llama_like("llama", "LlamaForCausalLM", mlp_bias=True),
    _llama_like("mistral", "MistralForCausalLM"),
    _llama_like("qwen2", "Qwen2ForCausalLM"),
    _llama_like("qwen3", "Qwen3ForCausalLM", head_dim=8),
    _llama_like("gemma", "GemmaForCausalLM", head_dim=8),
    Family(
        "phi3",
        _builder("Phi3ForCausalLM", _HF, num_key_value_heads=1, **_POSITIONS, **_IN_RANGE),
        _layers("model.layers.{}.mlp"),
        ("gate_up_proj",),
        "down_proj",
        fused=True,
    ),
    Family(
        "opt",
        _builder(
            "OPTForCausalLM",
            "hidden_size ffn_dim num_hidden_layers num_attention_heads",
            word_embed_proj_dim=D_MODEL,
            **_POSITIONS,
        ),
        _layers("model.decoder.layers.{}"),
        ("fc1",),
        "fc2",
    ),
    _experts("mixtral", "MixtralForCausalLM", "model.layers.{}.mlp.experts.{}"),
    _experts("gpt_oss", "GptOssForCausalLM", "model.layers.{}.mlp.experts.{}", transposed=True, interleaved=True),
    Family(
        "switch",
        _builder(
            "SwitchTransformersForConditionalGeneration",
            "d_model d_ff num_layers num_heads",
            num_decoder_layers=LAYERS,
            num_experts=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            decoder_start_token_id=0,
            d_kv=8,
        ),
        (
            "encoder.block.0.layer.1.mlp",
            *(f"encoder.block.1.layer.1.mlp.experts.expert_{i}" for i in range(2)),
            "decoder.block.0.layer.2.mlp",
            *(f"decoder.block.1.layer.2.mlp.experts.expert_{i}" for i in range(2)),
        ),
        ("wi",),
        "wo",
        seq2seq=True,
    ),
)

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
