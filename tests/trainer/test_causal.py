"""Causal language models: their head in chunks trains as the stock Trainer does, and evaluation is over all tokens."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.causal import SIZES, llama, texts
from support.tiny_runs import VOCABULARY, assert_same_weights, losses
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    set_seed,
)
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.utils import logging

from hf_recycle import RecyclingTrainer
from hf_recycle.mlm import chunked_head
from hf_recycle.mlm.causal_batches import CausalCollator

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    set_seed(7)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    config.bos_token_id = config.eos_token_id = 1
    return GPT2LMHeadModel(config)


def capped() -> Gemma2ForCausalLM:
    set_seed(7)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_head, "_LOGITS", 7 * VOCABULARY)
    monkeypatch.setattr(chunked_head, "_ROWS", {"cpu": 7})


@pytest.fixture
def run(arguments, monkeypatch):
    """`run(model, **settings)`: a finished training, and how many chunks it computed."""

    def train(model, cls=RecyclingTrainer, folder="run", resume=None, **settings):
        chunks = []
        summed = chunked_head.summed_head_loss
        with monkeypatch.context() as patch:
            patch.setattr(chunked_head, "summed_head_loss", lambda *args: chunks.append(1) or summed(*args))
            trainer = cls(
                model=model,
                args=arguments(folder, **{"max_steps": 6, **settings}),
                train_dataset=texts(),
                eval_dataset=texts(11, seed=1),
                data_collator=CausalCollator(),
            )
            trainer.train(resume_from_checkpoint=resume)
        return trainer, len(chunks)

    return train


def assert_close(first, second, **tolerances) -> None:
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, **tolerances)


STOCK = {"optim": "sgd", "learning_rate": 0.5, "deterministic_masking": False}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("setting", [{}, {"gradient_accumulation_steps": 3}, {"activation_checkpointing": True},
                                     {"recompute_activations": False}, {"bf16": True}], ids=str)  # fmt: skip
def test_training_in_chunks_is_that_of_the_stock_trainer(setting, tied, run):
    """By plain gradient descent, so that the scale of the gradients shows."""
    stock, _ = run(llama(tied), Trainer, **STOCK, **setting)
    ours, chunked = run(llama(tied), **STOCK, **setting)
    assert chunked == 6 * setting.get("gradient_accumulation_steps", 1)
    precision = 3e-3 if "bf16" in setting else 1e-5
    assert losses(ours) == pytest.approx(losses(stock), rel=precision)
    assert_close(ours, stock, rtol=precision, atol=precision)


@pytest.mark.parametrize("build", [llama, gpt2, capped])
def test_everything_off_is_the_stock_trainer(build, run):
    """To the bit, evaluation too."""
    off = {"masked_head": False, "chunked_head": False}
    (stock, _), (ours, chunked) = run(build(), Trainer), run(build(), **off)
    assert ours.steps_aside
    assert chunked == 0
    assert losses(ours) == losses(stock)
    assert_same_weights(ours, stock)
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


@pytest.mark.parametrize("build", [llama, gpt2, capped])
@pytest.mark.parametrize("chunked", [True, False])
def test_accumulation_equals_one_large_batch(build, chunked, run):
    """Uneven numbers of tokens: a mean of micro-batch means would differ."""
    settings = {"chunked_head": chunked, "magnitude_steps": 4, "optim": "sgd", "learning_rate": 0.5, "max_steps": 3}
    large, _ = run(build(), **settings, per_device_train_batch_size=12)
    small, _ = run(build(), **settings, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert losses(large) == pytest.approx(losses(small), rel=1e-5)
    assert_close(large, small, rtol=1e-5, atol=1e-6)
    if build is not gpt2:  # of which the stock Trainer counts the first token of each sequence too
        assert losses(large)[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)


@pytest.mark.parametrize("build", [llama, gpt2, capped])
@pytest.mark.parametrize("chunked", [True, False])
def test_evaluation_is_a_mean_over_all_tokens(build, chunked, arguments):
    """Against one forward pass per sample of the full head."""
    data = texts(11, seed=1)
    trainer = RecyclingTrainer(
        model=build(),
        args=arguments(per_device_eval_batch_size=4, chunked_head=chunked, magnitude_steps=2),
        eval_dataset=data,
        data_collator=CausalCollator(),
    )
    metrics = trainer.evaluate()
    total, hits, tokens = 0.0, 0, 0
    with torch.no_grad():
        for sample in data:
            ids = sample["input_ids"]
            logits = trainer.model.eval()(input_ids=torch.tensor([ids])).logits[0].double()
            for place, token in enumerate(ids[1:]):
                total -= float(logits[place].log_softmax(-1)[token])
                hits += int(logits[place].argmax() == token)
                tokens += 1
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(hits / tokens)
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (11, 12, VOCABULARY)
    assert predicted.metrics["test_loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_equals_an_uninterrupted_one(run):
    settings = {"save_strategy": "steps", "save_steps": 3, "recycle_steps": 2, "recycle_fraction": 0.2}
    whole, _ = run(gpt2(dropout=0.1), **settings)
    again, _ = run(gpt2(dropout=0.1), folder="run", resume=f"{whole.args.output_dir}/checkpoint-3", **settings)
    assert losses(whole)[-3:] == losses(again)[-3:]
    assert_same_weights(whole, again)


def test_what_else_trains_with_the_full_head(run, caplog):
    """A frozen model with adapters in chunks; one whose adapter is in the head with the full head, and said."""
    logging.enable_propagation()
    targets = {"q_proj": 6, "lm_head": 0}
    for target, chunks in targets.items():
        caplog.clear()
        stock, _ = run(get_peft_model(llama(), LoraConfig(target_modules=[target])), Trainer, **STOCK)
        ours, chunked = run(get_peft_model(llama(), LoraConfig(target_modules=[target])), **STOCK)
        assert chunked == chunks
        assert losses(ours) == pytest.approx(losses(stock), rel=1e-5)
        assert ("can't compute its head in chunks" in caplog.text) == (not chunks)
    logging.disable_propagation()


@pytest.mark.parametrize("what", ["compiled", "fp16", "soft cap"])
def test_the_full_head_where_chunks_can_not_be(what, arguments, caplog):
    model = capped() if what == "soft cap" else llama()
    trainer = RecyclingTrainer(model=model, args=arguments(), train_dataset=texts(), data_collator=CausalCollator())
    if what == "compiled":
        trainer._compiled = True
    elif what == "fp16":
        trainer.accelerator.state._mixed_precision = "fp16"
    logging.enable_propagation()
    assert trainer._own_head() is trainer._own_head() is None
    logging.disable_propagation()
    assert caplog.text.count("can't compute its head in chunks") == 1


class Penalised(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        outputs.loss = outputs.loss + outputs.logits.square().mean()
        return outputs


def test_a_loss_of_the_users_stays_the_users(run):
    models: list[nn.Module] = [llama(), llama()]
    for model in models:
        model.__class__ = Penalised
    stock, _ = run(models[0], Trainer, **STOCK)
    ours, chunked = run(models[1], **STOCK)
    assert chunked == 0
    assert losses(ours) == losses(stock)
    assert_same_weights(ours, stock)


def test_labels_that_a_collator_has_moved(run, arguments):
    """As collators without padding do: what `shift_labels` says is predicted."""

    def shifted(examples):
        batch = CausalCollator()(examples)
        batch["shift_labels"] = batch["input_ids"].roll(-2, dims=1)
        return batch

    results = []
    for cls in (Trainer, RecyclingTrainer):
        trainer = cls(model=llama(), args=arguments(**STOCK), train_dataset=texts(), data_collator=shifted)
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == results[1]
