"""Finding blocks: by family, by pattern, by shape."""

import pytest
import torch
import transformers
from torch import nn

from hf_recycle import find_feed_forwards
from hf_recycle.neurons.families import FAMILIES, Layout, parse_layout
from hf_recycle.neurons.find import survey
from hf_recycle.neurons.table import NeuronTable


def test_names_order_and_size(family):
    blocks = find_feed_forwards(family.build(d_ff=42))
    assert tuple(block.name for block in blocks) == family.block_names
    assert [block.num_neurons for block in blocks] == [42] * len(blocks)
    assert all(block.gated == family.gated for block in blocks)


def test_slices_are_the_projections(family):
    """Each slice is the parameter of the very layer that the family's source names; `attention.output.dense` and
    the bias of the out-projection belong to no neuron."""
    model = family.build()
    for block in find_feed_forwards(model):
        expected = family.parameters(model, block.name)
        assert {id(p) for p in block.parameters()} == {id(p) for p in expected}


def test_name_is_the_smallest_common_module(family):
    model = family.build()
    for block in find_feed_forwards(model):
        assert model.get_submodule(block.holder) is family.holder(model, block.name)
        if family.experts:
            continue
        holder = model.get_submodule(block.name)
        layers = [holder.get_submodule(path) for path in (*family.ins, family.out)]
        for child in holder.children():
            inside = set(map(id, child.modules()))
            assert not all(id(layer) in inside for layer in layers)


def test_d_ff_equal_to_d_model_is_no_trap(family):
    """Shapes cannot tell the projections from attention then; names must."""
    blocks = find_feed_forwards(family.build(d_model=16, d_ff=16))
    assert tuple(block.name for block in blocks) == family.block_names


def test_a_bare_base_model_and_a_wrapped_one():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    assert [b.name for b in find_feed_forwards(transformers.BertModel(config))] == [
        "encoder.layer.0",
        "encoder.layer.1",
    ]
    wrapped = nn.Module()
    wrapped.inner = transformers.BertModel(config)
    assert [b.name for b in find_feed_forwards(wrapped)] == ["inner.encoder.layer.0", "inner.encoder.layer.1"]


def test_encoder_and_decoder_of_a_composite_model():
    """The decoder's cross-attention also has an `output.dense`."""
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    names = [block.name for block in find_feed_forwards(transformers.EncoderDecoderModel(both))]
    assert names == ["encoder.encoder.layer.0", "decoder.bert.encoder.layer.0"]


def test_more_than_ten_layers_keep_their_order(family_named):
    names = [block.name for block in find_feed_forwards(family_named("bert").build(layers=12))]
    assert names == [f"bert.encoder.layer.{i}" for i in range(12)]


# ---- pattern ----


def test_pattern_overrides_the_registry(family_named):
    """A user may point at other layers than the registry would."""
    model = family_named("bert").build(d_ff=42)
    blocks = find_feed_forwards(model, "attention.self.query -> attention.output.dense")
    assert [(block.name, block.num_neurons) for block in blocks] == [
        ("bert.encoder.layer.0.attention", 16),
        ("bert.encoder.layer.1.attention", 16),
    ]


def test_patterns_plain_gated_and_fused(plain_net, family_named):
    assert [b.name for b in find_feed_forwards(plain_net(), "first -> second")] == ["blocks.0", "blocks.1"]
    gated = find_feed_forwards(plain_net(gated=True), " first + gate->second ")
    assert [b.name for b in gated] == ["blocks.0", "blocks.1"]
    assert gated[0].gated
    modern = find_feed_forwards(family_named("modernbert").build(d_ff=42), "fused:Wi -> Wo")
    assert [(b.num_neurons, b.gated) for b in modern] == [(42, True)] * 2


@pytest.mark.parametrize("pattern", ["", "fc1", "fc1 ->", "-> fc2", "a + b + c -> d", "fused:a + b -> c", "a + -> c"])
def test_malformed_pattern_says_which_forms_there_are(plain_net, pattern):
    with pytest.raises(ValueError, match=r"ff_pattern=.*must have the form 'in -> out'") as error:
        find_feed_forwards(plain_net(), pattern)
    assert repr(pattern) in str(error.value)


def test_pattern_that_matches_nothing_lists_candidates(plain_net):
    with pytest.raises(ValueError, match=r"ff_pattern='fc1 -> fc2' matches nothing") as error:
        find_feed_forwards(plain_net(d_model=6, d_ff=20), "fc1 -> fc2")
    assert "blocks.0.first -> blocks.0.second (6 -> 20 -> 6)" in str(error.value)


def test_parse_layout():
    assert parse_layout("a.b -> c") == Layout(("a.b",), "c")
    assert parse_layout("fused: a->c") == Layout(("a",), "c", fused=True)


# ---- by shape ----


@pytest.mark.parametrize("gated", [False, True])
def test_unknown_torch_model_by_shape(plain_net, gated):
    blocks = find_feed_forwards(plain_net(d_model=6, d_ff=20, layers=3, gated=gated))
    assert [(b.name, b.num_neurons, b.gated) for b in blocks] == [(f"blocks.{i}", 20, gated) for i in range(3)]


def test_unknown_sequential_model():
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
    (block,) = find_feed_forwards(model)
    assert block.name == ""
    assert block.num_neurons == 9
    assert block["in"].parameter is model[0].weight


def test_torch_transformer_encoder_by_shape():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=20)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    blocks = find_feed_forwards(model)
    assert [(b.name, b.num_neurons) for b in blocks] == [("layers.0", 20), ("layers.1", 20)]


def test_models_of_transformers_outside_the_registry():
    ctrl = transformers.CTRLLMHeadModel(transformers.CTRLConfig(vocab_size=40, n_embd=8, n_layer=2, n_head=2, dff=20))
    xlnet = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=2, n_head=2, d_inner=20)
    )
    for model, names, first in (
        (ctrl, "transformer.h.{}.ffn", "0"),
        (xlnet, "transformer.layer.{}.ff", "layer_1"),
    ):
        assert model.config.model_type not in FAMILIES
        blocks = find_feed_forwards(model)
        assert [(b.name, b.num_neurons) for b in blocks] == [(names.format(i), 20) for i in range(2)]
        assert blocks[0]["in"].parameter is model.get_submodule(f"{names.format(0)}.{first}").weight


def test_unlisted_model_type_with_a_known_layout():
    """GPT-Neo names its layers as GPT-2 does, but with nn.Linear."""
    config = transformers.GPTNeoConfig(
        vocab_size=40, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=20, attention_types=[[["global"], 2]]
    )
    blocks = find_feed_forwards(transformers.GPTNeoForCausalLM(config))
    assert [(b.name, b.num_neurons) for b in blocks] == [("transformer.h.0.mlp", 20), ("transformer.h.1.mlp", 20)]
    assert blocks[0]["in"].dim == 0


class _WideAttention(nn.Module):
    """Grouped-query attention whose heads are together wider than the model: q widens, o narrows, as a block would."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 24), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o_proj = nn.Linear(24, 8)


class _BottleneckAdapter(nn.Module):
    """Narrows first and widens then: a shape turned inside out."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)


def _layer(**extra: nn.Module) -> nn.Module:
    return nn.ModuleDict({**extra, "ff": nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))})


def test_an_adapter_is_no_block():
    model = nn.ModuleList([_layer(adapter=_BottleneckAdapter())])
    assert [block.name for block in find_feed_forwards(model)] == ["0.ff"]


@pytest.mark.parametrize("name", ["input_layernorm", "router", "adapter_modules"])
def test_what_gates_a_norm_or_chooses_experts_is_no_block(name):
    """Two linear layers called as those of a known layout; neither is it said to be left out."""
    beside = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(8, 20), "fc2": nn.Linear(20, 8)})})
    layers = [_layer(**{name: beside}) for _ in range(2)]
    found = survey(nn.ModuleList(layers))
    assert [block.name for block in found.blocks] == ["0.ff", "1.ff"]
    assert not found.left_out
    assert [block.name for block in find_feed_forwards(layers[0], "fc1 -> fc2")] == [f"{name}.mlp"]


def test_wide_attention_is_no_block():
    model = nn.ModuleList([_layer(self_attn=_WideAttention())])
    assert [block.name for block in find_feed_forwards(model)] == ["0.ff"]


def test_a_flat_layer_with_wide_attention():
    """The pair lies directly in the layer, beside the attention module (as in OPT)."""
    layer = nn.ModuleDict({"self_attn": _WideAttention(), "wide": nn.Linear(8, 20), "narrow": nn.Linear(20, 8)})
    assert [(b.name, b.num_neurons) for b in find_feed_forwards(nn.ModuleList([layer]))] == [("0", 20)]


def test_no_block_lists_candidates_or_says_there_are_none():
    with pytest.raises(ValueError, match=r"No feed-forward block was found in Linear.*no pair of linear layers"):
        find_feed_forwards(nn.Linear(4, 4))
    square = nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)})
    with pytest.raises(ValueError, match=r"pairs of linear layers that could be a block: a -> b \(5 -> 5 -> 5\)"):
        find_feed_forwards(square)


def test_integer_weights_are_no_neurons(plain_net):
    """A quantised layer is not to be written to."""
    model = plain_net()
    for block in model.blocks:
        block.first.weight = nn.Parameter(torch.ones(20, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="No feed-forward block"):
        find_feed_forwards(model)


# ---- Layers, embeddings, heads ----


class _Layer(nn.Module):
    """d -> f -> d with f < d, the names of no family, and norms of d entries."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(5, 8)


def test_residual_dimensions_are_no_neurons():
    """With d_ff below d_model, shapes alone take one layer's second and the next one's first for a block."""
    with pytest.raises(ValueError, match="No feed-forward block"):
        find_feed_forwards(nn.Sequential(_Layer(), _Layer()))
    shapes = {"a": (8, 5), "b": (5, 8), "c": (8, 5), "d": (5, 8)}
    twice = nn.ModuleDict({"norm": nn.LayerNorm(8), **{name: nn.Linear(*shape) for name, shape in shapes.items()}})
    with pytest.raises(ValueError, match="No feed-forward block") as error:
        find_feed_forwards(nn.ModuleList([twice]))
    assert "could be a block: 0.a -> 0.b (8 -> 5 -> 8); 0.c -> 0.d (8 -> 5 -> 8)." in str(error.value)
    assert [block.num_neurons for block in find_feed_forwards(nn.ModuleList([twice]), "a -> b")] == [5]


def test_grouped_layers_are_refused_and_named():
    """Not the projection of the embeddings and the head, whose shapes mirror each other."""
    config = transformers.ConvBertConfig(
        vocab_size=40,
        hidden_size=8,
        embedding_size=4,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_ratio=2,
        conv_kernel_size=3,
        num_groups=2,
    )
    model = transformers.ConvBertForMaskedLM(config)
    with pytest.raises(ValueError, match=r"2 × convbert\.encoder\.layer\.\*\.intermediate \(GroupedLinearLayer\)"):
        find_feed_forwards(model)
    pattern = "convbert.embeddings_project -> generator_predictions.dense"
    with pytest.raises(ValueError, match=r"matches nothing in .*do not lie within one layer"):
        find_feed_forwards(model, pattern)


def test_a_pattern_that_spans_layers_is_refused(family_named):
    model = family_named("llama").build()
    with pytest.raises(ValueError, match="do not lie within one layer"):
        find_feed_forwards(model, "layers.0.self_attn.o_proj -> layers.1.self_attn.q_proj")


def test_a_fused_in_projection_is_a_hint_and_attention_is_none():
    layer = nn.ModuleDict({"self_attn": _WideAttention(), "wide": nn.Linear(8, 40), "narrow": nn.Linear(20, 8)})
    with pytest.raises(ValueError, match="No feed-forward block") as error:
        find_feed_forwards(nn.ModuleList([layer]))
    assert "fused:0.wide -> 0.narrow (8 -> 40 -> 8)" in str(error.value)
    assert "attn" not in str(error.value)
    (block,) = find_feed_forwards(nn.ModuleList([layer]), "fused:wide -> narrow")
    assert (block.name, block.num_neurons, block.gated) == ("0", 20, True)


def test_layers_of_token_mixers_have_none():
    config = transformers.MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="Its layers hold none: they are made of MambaMixer, which mix tokens"):
        find_feed_forwards(transformers.MambaForCausalLM(config))


def test_two_blocks_of_one_module_have_two_names():
    """LiLT's layers hold a block for text and one for layout: counts and checkpoints know blocks by their names."""
    config = transformers.LiltConfig(
        vocab_size=40, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        blocks = find_feed_forwards(transformers.LiltModel(config))
    names = [name for i in range(2) for name in (f"encoder.layer.{i}", f"encoder.layer.{i}.layout_intermediate.dense")]
    assert [block.name for block in blocks] == names
    assert [block.num_neurons for block in blocks] == [48, 12] * 2
    assert [block.holder for block in blocks] == ["encoder.layer.0"] * 2 + ["encoder.layer.1"] * 2


# ---- Parts of a model ----


def clip() -> nn.Module:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 40, "intermediate_size": 20},
        vision_config={**shape, "intermediate_size": 24, "image_size": 8, "patch_size": 4},
    )
    with torch.device("meta"):
        return transformers.CLIPModel(config)


def test_all_parts_or_the_one_that_is_asked_for(family_named):
    model = clip()
    assert [block.num_neurons for block in find_feed_forwards(model)] == [20, 24]
    assert [block.num_neurons for block in find_feed_forwards(model, ff_blocks="vision")] == [24]
    assert [block.num_neurons for block in find_feed_forwards(model, ff_blocks="text_model")] == [20]
    with pytest.raises(
        ValueError, match="ff_blocks='audio' names no part of the model: name one of text_model, vision"
    ):
        find_feed_forwards(model, ff_blocks="audio")
    t5 = find_feed_forwards(family_named("t5-relu").build(), ff_blocks="decoder")
    assert [block.name.partition(".")[0] for block in t5] == ["decoder"] * 2
    with pytest.raises(
        ValueError, match=r"ff_blocks='audio' names no part of the model: it has one part, leave it out"
    ):
        find_feed_forwards(family_named("bert").build(), ff_blocks="audio")


def test_experts_of_unlike_layers_and_the_shared_one():
    config = transformers.Qwen2MoeConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=20,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        num_experts=2,
        mlp_only_layers=[0],
    )
    with torch.device("meta"):
        blocks = find_feed_forwards(transformers.Qwen2MoeForCausalLM(config))
    assert [(block.name.removeprefix("model.layers."), block.num_neurons) for block in blocks] == [
        ("0.mlp", 20),
        ("1.mlp.experts.0", 12),
        ("1.mlp.experts.1", 12),
        ("1.mlp.shared_expert", 16),
    ]


def test_what_is_left_out_is_said_once_with_the_table(caplog):
    class UnknownMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 20, 3)

    def known() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))

    model = nn.ModuleList([nn.ModuleDict({"a": known(), "b": UnknownMLP()}) for _ in range(2)])
    found = survey(model)
    assert [block.name for block in found.blocks] == ["0.a", "1.a"]
    assert [(other.name, other.made_of) for other in found.left_out] == [("0.b", "Conv1d"), ("1.b", "Conv1d")]
    for _ in range(2):
        NeuronTable.of(model)
    [message] = [record.getMessage() for record in caplog.records]
    assert "2 modules of ModuleList look like feed-forward blocks and are left out" in message
    assert "2 × *.b (Conv1d)" in message
