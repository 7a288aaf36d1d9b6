"""Blocks of checkpoints on disk, of every family and layout of files, against the loaded model."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig

from hf_recycle import neuron_magnitudes
from hf_recycle.analysis.model import analyze
from hf_recycle.analysis.source import Source
from hf_recycle.errors import UserError


def assert_like(folder, expected, **options):
    """The checkpoint has the blocks and magnitudes `expected`."""
    found = analyze(Source(str(folder)), **options)
    assert [block.name for block in found.blocks] == list(expected)
    for block in found.blocks:
        assert np.allclose(block.magnitudes, expected[block.name].numpy(), rtol=1e-5), block.name
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(family)`: the folder of a model of the family and its magnitudes, made once."""
    from support import families

    made = {}

    def save(family):
        if family.name not in made:
            torch.manual_seed(1)
            model = families.perturb(family.build())
            folder = tmp_path_factory.mktemp(family.name)
            model.save_pretrained(folder)
            made[family.name] = folder, neuron_magnitudes(model)
        return made[family.name]

    return save


def edit(folder, change, to):
    """A copy of a checkpoint whose tensors are changed in place by `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_every_family(family, saved):
    folder, expected = saved(family)
    found = assert_like(folder, expected)
    assert found.blocks[0].name == family.block_names[0]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-gated", "modernbert"])
def test_a_few_rows_at_a_time(name, family_named, saved, monkeypatch):
    monkeypatch.setattr("hf_recycle.analysis.checkpoint._BYTES_AT_ONCE", 600)
    folder, expected = saved(family_named(name))
    assert_like(folder, expected)


@pytest.mark.parametrize("name", ["bert", "t5-relu", "gpt2"])
def test_shards_of_which_only_those_with_feed_forward_weights_are_read(name, family_named, tmp_path, perturb):
    model = perturb(family_named(name).build())
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    words = ("intermediate.dense", "output.dense", "DenseReluDense", "mlp.")
    needed = {file for key, file in weights.items() if any(word in key for word in words)}
    others = set(weights.values()) - needed
    assert others
    for file in others:
        (tmp_path / file).unlink()
    assert_like(tmp_path, neuron_magnitudes(model))
    (tmp_path / sorted(needed)[0]).unlink()
    with pytest.raises(UserError, match=f"{sorted(needed)[0]} is missing"):
        analyze(Source(str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, family_named, tmp_path, perturb):
    model = perturb(family_named("llama").build()).to(dtype)
    model.save_pretrained(tmp_path)
    assert_like(tmp_path, neuron_magnitudes(model))


def test_a_base_model_of_which_the_config_names_the_head_and_the_other_way_round(saved, family_named, tmp_path):
    folder, expected = saved(family_named("bert"))

    def without_prefix(tensors):
        for key in list(tensors):
            if key.startswith("bert."):
                tensors[key.removeprefix("bert.")] = tensors.pop(key)

    assert_like(edit(folder, without_prefix, tmp_path / "a"), expected)
    other = edit(folder, lambda tensors: None, tmp_path / "b")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert_like(other, {key.removeprefix("bert."): value for key, value in expected.items()})


def test_old_names_and_pickled_weights(saved, family_named, tmp_path):
    folder, expected = saved(family_named("bert"))
    tensors = load_file(folder / "model.safetensors")
    for key in list(tensors):
        new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[new] = tensors.pop(key)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_like(tmp_path, expected)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONVERTED = {
    "halves in one tensor": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**SMALL, use_swiglu_ffn=True, image_size=8, patch_size=4)
    ),
    "halves the other way round": lambda: transformers.GteModel(
        transformers.GteConfig(**SMALL, **IDS, intermediate_size=42)
    ),
    "transposed experts": lambda: transformers.Qwen3VLMoeTextModel(
        transformers.Qwen3VLMoeTextConfig(
            **SMALL, **IDS, intermediate_size=42, moe_intermediate_size=24, num_experts=3, num_key_value_heads=1,
            head_dim=8,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVERTED)
def test_weights_that_are_converted_when_they_are_loaded(kind, perturb, tmp_path):
    model = perturb(CONVERTED[kind]())
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) != set(model.state_dict()) or kind == "transposed experts"
    assert_like(tmp_path, neuron_magnitudes(model))


def test_parts_that_do_not_fit_together(tmp_path):
    CONVERTED["halves in one tensor"]().save_pretrained(tmp_path)

    def cut(tensors):
        key = next(key for key in tensors if key.endswith("weights_in.weight"))
        tensors[key] = tensors[key][:-2].clone()

    with pytest.raises(UserError, match=r"don't give a encoder\.layer\.0\.mlp\.gate_proj\.weight of shape"):
        analyze(Source(str(edit(tmp_path, cut, tmp_path / "cut"))))


def test_tensors_that_are_none_of_the_model_are_ignored(saved, family_named, tmp_path):
    folder, expected = saved(family_named("bert"))
    extra = {
        "something.else": torch.zeros(3),
        "bert.encoder.layer.7.output.dense.weight": torch.full((2, 2), torch.nan),
    }
    assert_like(edit(folder, lambda tensors: tensors.update(extra), tmp_path), expected)


def test_the_newest_checkpoint_of_a_run(saved, family_named, tmp_path):
    folder, expected = saved(family_named("electra"))
    for step in (9, 10):
        edit(
            folder, lambda tensors, step=step: [t.mul_(step) for t in tensors.values()], tmp_path / f"checkpoint-{step}"
        )
    assert_like(tmp_path, {name: 100 * value for name, value in expected.items()})


def test_a_model_of_unknown_layout(tmp_path, saved, family_named):
    folder, expected = saved(family_named("bert"))
    with pytest.raises(UserError, match=r"ff_pattern='nothing -> here' matches nothing .* -> .*layer.0.output.dense"):
        analyze(Source(str(folder)), "nothing -> here")
    assert_like(folder, expected, pattern="intermediate.dense -> output.dense")


def test_a_model_without_feed_forward_blocks(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, state_size=4, num_hidden_layers=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="No feed-forward block was found in MambaForCausalLM"):
        analyze(Source(str(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["1.intermediate.dense.weight", "1.output.dense.weight", "0.intermediate.dense.bias"])
def test_weights_that_are_not_finite(value, key, saved, family_named, tmp_path):
    def spoil(tensors):
        tensors[f"bert.encoder.layer.{key}"][(0, 5) if "output" in key else 5] = value

    folder = edit(saved(family_named("bert"))[0], spoil, tmp_path)
    where = f"block bert.encoder.layer.{key[0]}: .*first of them 5, are NaN or infinite"
    with pytest.raises(UserError, match=where):
        analyze(Source(str(folder)))


def test_huge_finite_weights_are_no_error(saved, family_named, tmp_path):
    def grow(tensors):
        tensors["bert.encoder.layer.0.intermediate.dense.weight"].fill_(3e38)

    analyze(Source(str(edit(saved(family_named("bert"))[0], grow, tmp_path))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"), "lack bert.encoder.layer.1.output.dense.weight"),
        (
            lambda t: t.update({"bert.encoder.layer.1.output.dense.weight": torch.zeros(16, 41)}),
            r"has shape \(16, 41\), and config.json asks for \(16, 42\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(change, message, saved, family_named, tmp_path):
    with pytest.raises(UserError, match=message):
        analyze(Source(str(edit(saved(family_named("bert"))[0], change, tmp_path))))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no config.json"),
        ({"config.json": "{}"}, "config.json can't be used"),
        ({"config.json": '{"model_type": "bert"}'}, "neither model.safetensors nor"),
        ({"config.json": '{"model_type": "bert", "quantization_config": {"quant_method": "x"}}'}, "is quantised"),
        ({"config.json": '{"model_type": "bert"}', "model.safetensors": "x"}, "is damaged"),
        ({"config.json": '{"model_type": "bert"}', "model.safetensors.index.json": "{"}, "is damaged"),
        (
            {
                "config.json": '{"model_type": "bert"}',
                "model.safetensors.index.json": '{"weight_map": {"a": "../../secret.safetensors"}}',
            },
            "no shard beside it",
        ),
    ],
)
def test_folders_that_are_no_models(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        analyze(Source(str(tmp_path)))


def test_names_that_are_nothing(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Source(str(tmp_path / "file.txt"))
    with pytest.raises(UserError, match="no folder here, and it is not the name of a repository"):
        analyze(Source("no//where"))
    with pytest.raises(UserError, match="applies to repositories of the Hub"):
        Source(str(tmp_path), revision="main")


def test_code_of_a_repository_is_never_run(tmp_path, saved, family_named):
    folder = edit(saved(family_named("bert"))[0], lambda tensors: None, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match=r"config\.json can't be used"):
        analyze(Source(str(folder)))


def test_auto_model_where_the_architecture_is_unknown(tmp_path, saved, family_named):
    folder, expected = saved(family_named("bert"))
    other = edit(folder, lambda tensors: None, tmp_path)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    found = assert_like(other, {key.removeprefix("bert."): value for key, value in expected.items()})
    assert found.architecture == AutoModel._model_mapping[BertConfig].__name__
