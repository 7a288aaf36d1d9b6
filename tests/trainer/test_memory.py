"""What keeps the memory of a training low: it must change nothing else, and leave nothing behind."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, sentences, tiny_bert
from torch import nn
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from benchmarks.memory import status
from hf_recycle import RecyclingTrainer
from hf_recycle.mlm import heads
from hf_recycle.mlm.cross_entropy import compact_loss
from hf_recycle.speed import host_memory
from hf_recycle.speed.host_memory import give_back_freed_memory
from hf_recycle.speed.onednn import is_available

CPU = torch.device("cpu")


@pytest.fixture
def run(arguments, tokenizer):
    def train(build=tiny_bert, trainer_class=RecyclingTrainer, **settings):
        trainer = trainer_class(
            model=build(),
            args=arguments(max_steps=6, recycle_steps=2, recycle_fraction=0.2, **settings),
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )
        replaced = []
        out = trainer.neuron_table().blocks[0].out_slice.module
        out.register_forward_hook(lambda *_: replaced.append("forward" in vars(out)))
        trainer.train()
        assert "forward" not in vars(out)
        assert not trainer.model.get_input_embeddings().sparse
        return trainer, replaced[0]

    return train


def test_recomputed_activations_change_nothing(run):
    (recomputed, replaced), (kept, none) = run(), run(recompute_activations=False)
    assert (replaced, none) == (True, False)
    assert losses(recomputed) == losses(kept)
    assert_same_weights(recomputed, kept)


@pytest.mark.parametrize(
    "setting",
    [{"activation_checkpointing": True}, pytest.param({"torch_compile_backend": "eager"}, marks=pytest.mark.slow)],
)
def test_where_something_else_decides_what_is_kept(setting, run):
    trainer, replaced = run(**setting)
    assert not replaced
    assert losses(trainer) == pytest.approx(losses(run()[0]), rel=1e-5)


def test_the_loss_of_the_restricted_head_makes_its_gradient_in_place(run, monkeypatch):
    shapes = []

    def watched(logits, *args, **kwargs):
        shapes.append(logits.shape)
        return compact_loss(logits, *args, **kwargs)

    monkeypatch.setattr("hf_recycle.trainer.language_modeling.compact_loss", watched)
    run()
    assert len(shapes) == 6
    assert all(len(shape) == 2 for shape in shapes)
    shapes.clear()
    run(masked_head=False)
    assert shapes == []


class Copies(TrainerCallback):
    """At every event of a training, a copy of the model and a pickle of it, as moving averages keep them."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[nn.Module, bytes]] = {}

    def __getattribute__(self, name: str):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def take(args, state, control, model, **kwargs) -> None:
            self.found[name] = copy.deepcopy(model), pickle.dumps(model)

        return take


@pytest.fixture
def economical(arguments, tokenizer):
    """`economical(model, **arguments)`: a trainer with everything that saves time and memory."""

    def make(model, callbacks=None, **settings):
        return RecyclingTrainer(
            model=model,
            args=arguments(recycle_steps=2, onednn_linear=is_available(), **settings),
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
            callbacks=callbacks,
        )

    return make


def attributes(model: nn.Module) -> list[tuple[type, set[str], int]]:
    """Of each module its class, what it has, and how many hooks."""
    return [
        (
            type(module),
            set(vars(module)) - {"_is_accelerate_prepared"},
            sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks")),
        )
        for module in model.modules()
    ]


def test_copies_made_at_any_event_are_as_those_of_a_stock_training(economical):
    copies = Copies()
    economical(tiny_bert(), [copies], max_steps=2, gradient_accumulation_steps=2).train()
    assert {"on_train_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"} < set(copies.found)
    assert {"on_step_begin", "on_step_end", "on_log", "on_train_end"} < set(copies.found)
    for copied, pickled in copies.found.values():
        assert attributes(copied) == attributes(tiny_bert())
        assert not copied.get_input_embeddings().sparse
        assert b"hf_recycle" not in pickled
        copied.bert(input_ids=torch.arange(8).view(1, 8)).last_hidden_state.square().mean().backward()
        assert not copied.get_input_embeddings().weight.grad.is_sparse


@pytest.mark.slow
def test_a_model_pickled_while_training_runs_is_loaded_without_this_package(economical, tmp_path):
    copies = Copies()
    economical(tiny_bert(), [copies], max_steps=1).train()
    (tmp_path / "model.pkl").write_bytes(copies.found["on_step_end"][1])
    script = "import pickle, sys; sys.modules['hf_recycle'] = None; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pkl"], check=True, timeout=120)


def test_after_a_training_that_fails_the_model_is_as_it_was(economical):
    model = tiny_bert()
    handle = model.bert.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        economical(model).train()
    handle.remove()
    assert attributes(model) == attributes(tiny_bert())
    assert not model.get_input_embeddings().sparse


def test_training_steps_of_the_users_keep_a_dense_gradient(run):
    """Their loss may leave the head out."""

    class Own(RecyclingTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            assert not model.get_input_embeddings().sparse
            loss = model.bert(input_ids=inputs["input_ids"]).last_hidden_state.square().mean()
            self.accelerator.backward(loss)
            return loss.detach()

    run(trainer_class=Own)


def test_memory_is_given_back_before_the_logits_of_each_training_batch_and_of_no_other(run, monkeypatch):
    def build():
        model = tiny_bert()
        model.bert.register_forward_pre_hook(lambda *_: events.append("forward"))
        model.cls.predictions.decoder.register_forward_hook(lambda *_: events.append("logits"))
        return model

    events = []
    monkeypatch.setattr(heads, "give_back_freed_memory", lambda device: events.append("given back"))
    trainer, _ = run(build, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert events == ["forward", "given back", "logits"] * 12
    events.clear()
    trainer.evaluate(sentences(seed=1))
    assert "given back" not in events
    assert "logits" in events


def holes(pieces: int, size: int) -> list[torch.Tensor]:
    """Makes the heap hold as many free pieces as pieces in use, in turn."""
    everything = [torch.ones(size, dtype=torch.uint8) for _ in range(2 * pieces)]
    return everything[::2]


@pytest.mark.skipif(host_memory._glibc() is None, reason="needs glibc 2.33")
@pytest.mark.parametrize("worth_it", [True, False])
def test_holes_in_the_heap_are_given_back(worth_it, monkeypatch):
    give_back_freed_memory(CPU)
    pieces = holes(1600, 100_000)  # below what glibc maps by itself
    if not worth_it:
        monkeypatch.setattr(host_memory, "_WORTH_IT", 2**40)
    before = status("VmRSS")
    give_back_freed_memory(CPU)
    given_back = before - status("VmRSS")
    assert (given_back > 100e6) == worth_it
    assert all(bool(piece.all()) for piece in pieces)


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(host_memory, "_glibc", lambda: None)
    give_back_freed_memory(CPU)
    give_back_freed_memory(torch.device("meta"))
