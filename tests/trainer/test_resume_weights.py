"""Every tensor of the model comes back: of a resumed run, and of the best model."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.renamed_models import FAMILIES, build
from support.tiny_runs import VOCABULARY, assert_same_weights, masked_sentences, tiny_bert
from torch import nn
from transformers import Trainer, TrainerCallback, default_data_collator

from hf_recycle import RecyclingTrainer
from hf_recycle.checkpoints.file_list import LIST_FILE
from hf_recycle.engines.plain_weights import load_plain_weights
from hf_recycle.errors import UserError


def samples(name: str) -> list[dict]:
    if name != "vit":
        return masked_sentences(16)
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2} for i in range(16)]


class Snapshots(TrainerCallback):
    """Copies of the weights, by step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


class BestAtThree(RecyclingTrainer):
    def evaluate(self, *args, **kwargs):
        return {"eval_loss": 1.0 + abs(self.state.global_step - 3)}


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
CHOOSING = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_saved_under_other_names_are_loaded(name, tmp_path):
    saved, model = build(name, seed=1), build(name, seed=2)
    saved.save_pretrained(tmp_path)
    assert (load_file(tmp_path / "model.safetensors").keys() <= saved.state_dict().keys()) != FAMILIES[name][2]
    load_plain_weights(model, tmp_path)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_and_the_best_model_have_every_weight(name, arguments):
    def run(cls, model, folder, resume=None, **settings):
        snapshots = Snapshots()
        trainer = cls(
            model=model,
            args=arguments(folder, **SAVING, **settings),
            train_dataset=samples(name),
            eval_dataset=samples(name),
            data_collator=default_data_collator,
            callbacks=[snapshots],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, snapshots.at

    whole, at = run(BestAtThree, build(name, seed=1), "whole", **CHOOSING)
    checkpoint = Path(whole.args.output_dir, "checkpoint-3")
    assert any(not torch.equal(value, at[6][key]) for key, value in at[3].items())
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, at[3][key]), key
    _, resumed = run(RecyclingTrainer, build(name, seed=2), "resumed", resume=str(checkpoint))
    for key, value in resumed[6].items():
        assert torch.equal(value, at[6][key]), key


def altered(folder: Path, change) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("bert.encoder.layer.0.output.dense.bias"), r"layer\.0\.output\.dense\.bias is missing"),
        (lambda t: [t.pop(key) for key in list(t) if "layer.1" in key], r"layer\.1\..* and 15 more are missing"),
        (lambda t: t.update({f"other.{key}": t.pop(key) for key in list(t)}), r"other\..* does not fit"),
        (lambda t: t.update({"bert.encoder.layer.2.extra": torch.ones(2)}), r"layer\.2\.extra does not fit"),
        (lambda t: t.update({"cls.predictions.bias": torch.ones(3)}), r"cls\.predictions\.bias does not fit"),
    ],
)
def test_weights_of_another_model_are_refused(change, said, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}.*{said}"):
        load_plain_weights(tiny_bert(), altered(tmp_path, change))


def test_an_expert_that_is_missing_is_refused(tmp_path):
    build("qwen2_moe", seed=1).save_pretrained(tmp_path)
    altered(tmp_path, lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        load_plain_weights(build("qwen2_moe", seed=2), tmp_path)


def test_weights_cut_into_several_files_are_loaded(tmp_path):
    saved, model = build("mixtral", seed=1), build("mixtral", seed=2)
    saved.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 3
    load_plain_weights(model, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())


def test_what_save_pretrained_leaves_out_may_be_missing(tmp_path):
    """The sinusoids of Marian."""
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    saved, model = transformers.MarianMTModel(config), transformers.MarianMTModel(config)
    saved.save_pretrained(tmp_path)
    assert "model.encoder.embed_positions.weight" not in load_file(tmp_path / "model.safetensors")
    load_plain_weights(model, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())


@pytest.mark.slow
def test_pickled_weights_of_older_checkpoints_are_checked_too(train):
    first = train(save_strategy="steps", save_steps=5, max_steps=5)
    folder = Path(first.args.output_dir, "checkpoint-5")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / LIST_FILE).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    again = train("again", resume=str(folder), max_steps=5, model=tiny_bert(d_ff=32))
    assert_same_weights(first, again)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"layer\.0\.output\.dense\.weight is missing"):
        train("refused", resume=str(folder), max_steps=5)


class TokenLoss(nn.Module):
    """A module that is no model of transformers, with a state of its own beside its parameters."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.readout = nn.Linear(8, VOCABULARY)
        self.norm = nn.BatchNorm1d(VOCABULARY)

    def forward(self, input_ids, labels=None):
        logits = self.norm(self.readout(self.embedding(input_ids)).flatten(0, 1)).view(*input_ids.shape, -1)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_module_that_is_no_pretrained_model_resumes(arguments):
    def run(folder, resume=None):
        trainer = RecyclingTrainer(
            model=TokenLoss(),
            args=arguments(folder, **SAVING),
            train_dataset=masked_sentences(24),
            data_collator=default_data_collator,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    checkpoint = Path(whole.args.output_dir, "checkpoint-3")
    assert_same_weights(whole, run("resumed", str(checkpoint)))
    altered(checkpoint, lambda tensors: tensors.pop("norm.running_var"))
    (checkpoint / LIST_FILE).unlink()
    with pytest.raises(UserError, match=r"norm\.running_var is missing"):
        run("refused", str(checkpoint))


# peft asks a model by a name that transformers is about to remove.
OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def train_adapter(arguments):
    """`train_adapter(folder, resume=, unfreeze=)`: a run of an adapter on a BERT whose own weights are frozen."""
    peft = pytest.importorskip("peft")

    def run(folder, resume=None, unfreeze="", cls=Trainer):
        model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query", "value"], bias="lora_only"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or bool(unfreeze and unfreeze in name))
        trainer = cls(
            model=model,
            # With the head on masked positions the last digits differ from the stock Trainer's.
            args=arguments(folder, masked_head=False, **SAVING),
            train_dataset=masked_sentences(),
            data_collator=default_data_collator,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@OF_PEFT
@pytest.mark.slow
def test_an_adapter_resumes_as_in_the_stock_trainer(train_adapter):
    stock = train_adapter("stock")
    whole = train_adapter("whole", cls=RecyclingTrainer)
    checkpoint = Path(whole.args.output_dir, "checkpoint-3")
    resumed = train_adapter("resumed", str(checkpoint), cls=RecyclingTrainer)
    assert_same_weights(stock, whole)
    assert_same_weights(whole, resumed)


@OF_PEFT
def test_what_trains_beside_an_adapter_and_is_not_saved_is_refused(train_adapter):
    first = train_adapter("first", unfreeze="layer.0.output.dense")
    with pytest.raises(UserError, match=r"layer\.0\.output\.dense\.weight trains, but .* holds the adapter alone"):
        train_adapter(
            "next", f"{first.args.output_dir}/checkpoint-3", unfreeze="layer.0.output.dense", cls=RecyclingTrainer
        )
