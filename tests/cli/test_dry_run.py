"""`train --dry_run`: against the stock Trainer, and against counts by hand."""

from types import SimpleNamespace

import pytest
import torch
from support.causal import llama
from support.tiny_runs import masked_sentences, tiny_bert
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_recycle import RecyclingArguments, RecyclingTrainer
from hf_recycle.cli.main import main
from hf_recycle.methods.all import CALLBACKS
from hf_recycle.mlm.chunked_head import find_chunked_head
from hf_recycle.runs.announcement import steps_text
from hf_recycle.runs.dry_run import planned_steps
from hf_recycle.runs.memory import activation_bytes, optimizer_bytes


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


@pytest.mark.parametrize(
    ("examples", "settings"),
    [
        (7, {"per_device_train_batch_size": 2, "num_train_epochs": 2}),
        (7, {"per_device_train_batch_size": 2, "dataloader_drop_last": True}),
        (9, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1.5}),
        (2, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 0.5}),
        (5, {"per_device_train_batch_size": 1, "max_steps": 3}),
    ],
)
def test_as_many_steps_as_the_stock_trainer_takes(examples, settings, tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | settings
    data = [{"x": torch.ones(1)}] * examples
    trainer = Trainer(Regression(), TrainingArguments(**common), train_dataset=data)
    trainer.train()
    assert planned_steps(RecyclingArguments(**common), examples) == trainer.state.max_steps


@pytest.mark.parametrize(
    ("optim", "expected"),
    [("adamw_torch", 8), ("sgd", 0), ("adagrad", 4), ("adafactor", 4 * 2 * 256 / 256**2), ("no_such", None)],
)
def test_what_an_optimizer_keeps(optim, expected, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.optim = optim
    found = optimizer_bytes(args, nn.Linear(100, 100, bias=False))
    # Beside it there may be a count of steps.
    assert found == expected if expected is None else 0 <= found / 10_000 - expected < 0.01


def test_what_muon_keeps(tmp_path):
    """Against what it has kept after a step."""
    args = RecyclingArguments(str(tmp_path), optim="muon", max_steps=1, use_cpu=True, save_strategy="no")
    trainer = RecyclingTrainer(tiny_bert(), args, train_dataset=masked_sentences(8))
    trainer.train()
    state = [t for entries in trainer.optimizer.state.values() for t in entries.values()]
    counts = sum(t.numel() * t.element_size() for t in state if t.numel() == 1)
    kept = sum(t.numel() * t.element_size() for t in state) - counts
    assert optimizer_bytes(trainer.args, trainer.model) == kept


def test_what_is_kept_in_8_bits(monkeypatch, tmp_path):
    """A tensor of the kind of torchao's: it says that it is float32, and is codes and scales."""

    class In8Bits(torch.Tensor):
        def __tensor_flatten__(self):
            return ["codes", "scale"], []

    class Optimizer(torch.optim.SGD):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                entry = torch.zeros_like(parameter).detach().as_subclass(In8Bits)
                entry.codes, entry.scale = torch.zeros(parameter.numel(), dtype=torch.uint8), torch.zeros(256)
                self.state[parameter]["exp_avg"] = entry

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args: (Optimizer, {"lr": 1.0}))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert 10_000 < optimizer_bytes(args, nn.Linear(100, 100, bias=False)) < 10_200


class Stack(nn.Module):
    """Two layers whose activations can be counted by hand."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, input_ids, labels=None):
        hidden = torch.tanh(self.first(input_ids.float().unsqueeze(-1).expand(*input_ids.shape, 8).contiguous()))
        return self.second(hidden).square().sum() if labels is not None else hidden


def test_activations_by_hand():
    model = Stack(32).to("meta")
    model.base_model, model.device, model.config = model, torch.device("meta"), SimpleNamespace(pad_token_id=None)
    positions = 3 * 5
    # The input of the first layer and tanh's output, which the second layer shares; the output that is squared.
    whole, base = 4 * positions * (8 + 32 + 8), 4 * positions * (8 + 32)
    assert activation_bytes(model, (3, 5)) == whole
    assert activation_bytes(model, (3, 5), head_share=0.5) == (whole + base) / 2


def small_bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=100, **sizes, attn_implementation="eager"))


def small_gpt2():
    """With padding, for which it looks."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 100}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, attn_implementation="eager"))


@pytest.mark.parametrize("make", [small_bert, small_gpt2])
def test_activations_on_shapes_are_those_of_a_computation(make):
    real = make()
    with torch.device("meta"):
        shapes = make()
    assert activation_bytes(shapes, (2, 16)) == activation_bytes(real, (2, 16)) > 0
    assert shapes.config.pad_token_id == 0


def test_what_is_kept_with_a_head_in_chunks():
    """Against a computation."""
    model, ids = llama(), torch.zeros((2, 16), dtype=torch.long)
    model.set_attn_implementation("eager")
    kept = {parameter.data_ptr(): 0 for parameter in (*model.parameters(), *model.buffers())}

    def note(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), find_chunked_head(model).at(ids):
        loss = model(input_ids=ids).logits
    assert loss.dim() == 0
    assert activation_bytes(model.to("meta"), (2, 16), in_chunks=True) == sum(kept.values())


def test_when_methods_act(tmp_path):
    settings = {"recycle_steps": 10, "recycle_start": 5, "prune_fraction": 0.5, "prune_steps": 20, "prune_end": 0.7}
    settings |= {"overtrain_steps": 25, "overtrain_batches": 1, "magnitude_steps": 0.5, "midpoint_weight": 0.1}
    settings |= {"shrink_perturb_steps": 25}
    args = RecyclingArguments(output_dir=str(tmp_path), **settings)
    found = {}
    for callback in CALLBACKS:
        method = callback.method_class(args.method_settings(callback.method_class.settings_class))
        method.settings = method.given.resolve(60, seed=1)
        found[callback.__name__] = method.acting_steps(60)
    assert found["MidpointLossCallback"] is None
    assert list(found["RecyclingCallback"]) == [5, 15, 25, 35, 45, 55]
    assert list(found["PruningCallback"]) == [0, 20, 40, 42]
    assert list(found["OvertrainingCallback"]) == [25, 50]
    assert list(found["MagnitudeCallback"]) == [0, 30, 60]
    assert list(found["ShrinkPerturbCallback"]) == [25, 50]


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (None, "at every step"),
        ([], "at 0 steps"),
        ([7], "at 1 step: 7"),
        (range(1000, 5000, 1000), "at 4 steps: 1,000, 2,000, 3,000, 4,000"),
        (range(10, 70, 10), "at 6 steps: 10, 20, ..., 60"),
    ],
)
def test_steps_in_words(steps, text):
    assert steps_text(steps) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recycle_layers", "9"], "recycle_layers=[9] names block 9: there are 2 blocks"),
        (["--config_overrides", "max_position_embeddings=8"], "max_seq_length=16 needs 16 positions"),
        (["--resume_from_checkpoint", "gone"], "resume_from_checkpoint='gone' does not exist"),
        (["--ff_pattern", "a -> b"], "'a -> b'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(words, message, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words to learn from\n" * 400)
    sizes = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32"
    common = ["--model_type", "bert", "--config_overrides", sizes, "--train_file", str(text), "--recycle_steps", "2"]
    common += [
        "--tokenizer_vocab_size",
        "256",
        "--max_steps",
        "8",
        "--max_seq_length",
        "16",
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
    ]
    assert main(["train", *common, *words, "--dry_run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
