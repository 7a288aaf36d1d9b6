import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from hf_recycle import find_feed_forwards
from hf_recycle.analysis.data_scores import ModelNeurons
from hf_recycle.analysis.random_inputs import outputs, random_inputs
from hf_recycle.analysis.shrink import ShrinkSettings, check_pruned_are_zero, removed_neurons, shrink
from hf_recycle.analysis.shrink_files import load_model, save_whole
from hf_recycle.analysis.source import Source
from hf_recycle.analysis.timing import Speedup
from hf_recycle.errors import UserError

WIDTHS = ("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim")


def mask_by_hand(family, model, block, index):
    """What pruning means: the out-columns are zero, the rest stays."""
    out = family.matrices(model, block.name)[2]
    out[:, index] = 0


def test_the_smaller_model_computes_what_the_masked_one_does(family, perturb, tmp_path):
    model = perturb(family.build())
    for number, block in enumerate(find_feed_forwards(model)):
        # Each layer keeps other neurons, and another number of them.
        mask_by_hand(family, model, block, torch.randperm(block.num_neurons)[: 25 - 3 * (number % 2)])
    expected = family.logits(model)

    shrunk = shrink(model, ShrinkSettings(multiple_of=4))
    shrunk.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()

    width = 17 if family.name == "albert" else 20
    width = -(-width // 4) * 4
    assert shrunk.d_ff == width
    assert [block.num_neurons for block in find_feed_forwards(loaded)] == [width] * len(shrunk.kept)
    config = AutoConfig.from_pretrained(tmp_path)
    assert width in [getattr(config, name, None) for name in WIDTHS]
    assert torch.allclose(family.logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(family.logits(model), expected), "the original is untouched"
    assert loaded.num_parameters() < model.num_parameters()


def test_a_fraction_removes_the_least_important_neurons(perturb, family_named):
    family = family_named("llama")
    model = perturb(family.build())
    block = find_feed_forwards(model)[1]
    order = block.magnitudes().argsort()
    kept = shrink(model, ShrinkSettings(fraction=0.3)).kept[block.name]
    assert kept.tolist() == sorted(order[int(0.3 * 42) :].tolist())
    kept = shrink(model, ShrinkSettings(fraction=0.3, criterion="high_magnitude")).kept[block.name]
    assert kept.tolist() == sorted(order[:-12].tolist())


def test_rounding_up_never_widens(family_named):
    model = family_named("bert").build()
    shrunk = shrink(model, ShrinkSettings(fraction=0.05, multiple_of=64))
    assert shrunk.d_ff == 42
    assert {len(index) for index in shrunk.kept.values()} == {40}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_stays(dtype, family_named):
    model = family_named("bert").build().to(dtype)
    assert shrink(model, ShrinkSettings(fraction=0.5)).model.dtype == dtype


def test_fractions_in_decimal():
    blocks = find_feed_forwards(torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.Linear(10, 4)), "0 -> 1")
    neurons = ModelNeurons(torch.nn.Identity(), blocks)
    assert len(removed_neurons(neurons, ShrinkSettings(fraction=0.3))[0]) == 3
    with pytest.raises(UserError, match=r"fraction=1\.0 leaves block .* with none of its 10 neurons"):
        removed_neurons(neurons, ShrinkSettings(fraction=1.0))


def test_what_can_not_be_shrunk(family_named):
    model = family_named("bert").build()
    with pytest.raises(UserError, match="no neuron of this model is pruned"):
        shrink(model, ShrinkSettings())
    for block in find_feed_forwards(model):
        block.out_slice.parameter.data.zero_()
    with pytest.raises(UserError, match="every neuron of this model is pruned"):
        shrink(model, ShrinkSettings())


def test_a_broken_model_is_called_broken(family_named):
    model = family_named("bert").build()
    find_feed_forwards(model)[0].out_slice.parameter.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="outputs are NaN or infinite; this checkpoint is broken"):
        shrink(model, ShrinkSettings(fraction=0.5))


def test_a_folder_that_can_not_be_made(family_named, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output='.*small' can't be written \(.*\); name another folder"):
        save_whole(tmp_path / "file" / "small", family_named("bert").build(), None)


def test_neurons_called_pruned_must_be_zero(family_named):
    family = family_named("gpt2")
    model = family.build()
    first, second = find_feed_forwards(model)
    masks = {block.name: torch.zeros(block.num_neurons, dtype=torch.bool) for block in (first, second)}
    masks[second.name][[3, 5]] = True
    mask_by_hand(family, model, second, torch.tensor([3]))
    with pytest.raises(UserError, match=rf"block {second.name}: 1 neurons that the recycling state calls pruned"):
        check_pruned_are_zero([first, second], masks)
    mask_by_hand(family, model, second, torch.tensor([5]))
    check_pruned_are_zero([first, second], masks)


def fields_apart() -> dict[str, PreTrainedModel]:
    """Models whose configuration sets the widths of two parts, or takes something else than tokens."""
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    tower = {**layers, "intermediate_size": 44}
    image = {"image_size": 8, "patch_size": 4}
    bart = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2))
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "encoder-decoder": transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=67,
                d_model=16,
                encoder_ffn_dim=44,
                decoder_ffn_dim=60,
                decoder_start_token_id=2,
                **bart,
                **ids,
            )
        ),
        "shared and routed experts": transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(
                **tower,
                **ids,
                vocab_size=67,
                num_key_value_heads=1,
                num_experts=3,
                num_experts_per_tok=2,
                moe_intermediate_size=28,
                shared_expert_intermediate_size=60,
            )
        ),
        "two towers": transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**tower, **ids, "vocab_size": 67},
                vision_config={**layers, **image, "intermediate_size": 60},
                projection_dim=8,
            )
        ),
        "vision": transformers.ViTForImageClassification(transformers.ViTConfig(**tower, **image)),
        "a ratio, stages of two widths": transformers.SwinModel(
            transformers.SwinConfig(
                image_size=16, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2
            )
        ),
        "a ratio for each stage": transformers.PvtModel(
            transformers.PvtConfig(
                image_size=16,
                num_encoder_blocks=2,
                depths=[1, 1],
                sequence_reduction_ratios=[2, 1],
                hidden_sizes=[16, 24],
                mlp_ratios=[4, 2],
                patch_sizes=[4, 2],
                strides=[4, 2],
                num_attention_heads=[2, 2],
            )
        ),
        "twice the width": transformers.MoshiForCausalLM(
            transformers.MoshiConfig(
                vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, ffn_dim=88, **ids
            )
        ),
        "audio": transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(
                **tower,
                conv_dim=(16, 16),
                conv_kernel=(4, 4),
                conv_stride=(4, 4),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
            )
        ),
        "no padding token": transformers.CodeGenForCausalLM(
            transformers.CodeGenConfig(
                vocab_size=67, n_embd=16, n_inner=44, n_layer=1, n_head=4, n_positions=32, rotary_dim=4, **ids
            )
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "encoder-decoder",
        "shared and routed experts",
        "two towers",
        "vision",
        "a ratio, stages of two widths",
        "a ratio for each stage",
        "twice the width",
        "audio",
        "no padding token",
    ],
)
def test_every_part_gets_a_width_of_its_own(kind, perturb, tmp_path):
    """`shrink` itself compares the outputs with those of the masked model; here, that the file gives the same model."""
    model = perturb(fields_apart()[kind]).eval()
    blocks = find_feed_forwards(model)
    shrunk = shrink(model, ShrinkSettings(fraction=0.5, multiple_of=4))
    shrunk.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    expected = {block.name: -(-(block.num_neurons // 2) // 4) * 4 for block in blocks}
    assert {block.name: block.num_neurons for block in find_feed_forwards(loaded)} == expected
    assert {name: now for name, (_, now) in shrunk.widths.items()} == expected
    assert shrunk.difference < 1e-4
    inputs = random_inputs(loaded, batch=2, length=8)
    assert torch.equal(outputs(loaded, inputs), outputs(shrunk.model, inputs))


def test_fewer_neurons_than_model_dimensions_though_found_by_shape(perturb):
    config = transformers.CTRLConfig(vocab_size=67, n_embd=16, n_layer=2, n_head=2, dff=40, n_positions=32)
    model = perturb(transformers.CTRLLMHeadModel(config)).eval()
    assert shrink(model, ShrinkSettings(fraction=0.8)).d_ff == 8


class WithHead(transformers.BertForMaskedLM):
    """A subclass of a user with a head of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(16, 3)


def test_a_class_of_the_users_stays_with_its_head(family_named, perturb, tmp_path):
    model = perturb(WithHead(family_named("bert").build().config)).eval()
    shrink(model, ShrinkSettings(fraction=0.5)).model.save_pretrained(tmp_path)
    loaded = WithHead.from_pretrained(tmp_path)
    assert torch.equal(loaded.extra.weight, model.extra.weight)
    assert find_feed_forwards(loaded)[0].num_neurons == 24


def test_what_is_said_of_speed_agrees_with_its_numbers():
    assert str(Speedup(0.000456, 0.000401, 1.01, 1.2)) == (
        "0.456 ms -> 0.401 ms, 1.14x as fast (quartiles of the pairs: 1.01 to 1.20)"
    )
    assert str(Speedup(1.5, 1.52, 0.9, 1.1)) == (
        "1500 ms -> 1520 ms, 0.99x as fast (quartiles of the pairs: 0.90 to 1.10): no difference that can be told from "
        "noise"
    )


class WithoutField(transformers.BertForMaskedLM):
    """A subclass of a user, whose blocks' width is written in the code."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.bert.encoder.layer:
            layer.intermediate.dense = torch.nn.Linear(16, 42)
            layer.output.dense = torch.nn.Linear(42, 16)


def test_a_width_that_no_field_sets(family_named):
    model = WithoutField(family_named("bert").build().config)
    with pytest.raises(
        UserError, match=r"no field of the configuration of WithoutField makes bert\.encoder\.layer\.0 \(42 neurons\)"
    ):
        shrink(model, ShrinkSettings(fraction=0.5))


def test_a_class_of_the_users_is_refused_rather_than_saved_without_its_head(family_named, tmp_path):
    config = family_named("bert").build().config
    WithoutField(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a WithoutField, which is no class of transformers: its head would be lost"):
        load_model(Source(str(tmp_path)))
