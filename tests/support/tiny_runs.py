"""Tiny models, data and runs for the tests of the trainer."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_recycle import RecyclingArguments, RecyclingTrainer
from support.words import SPECIAL, word_tokenizer

VOCABULARY = 64


def tiny_bert(dropout: float = 0.1, layers: int = 2, d_ff: int = 32) -> BertForMaskedLM:
    set_seed(7)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=d_ff,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def tiny_modernbert() -> ModernBertForMaskedLM:
    set_seed(7)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        )
    )


def tiny_t5() -> T5ForConditionalGeneration:
    """One layer of each: `encoder.block.0.layer.1.DenseReluDense`, `decoder.block.0.layer.2.DenseReluDense`."""
    set_seed(7)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def sentences(n: int = 48, length: int = 12, seed: int = 0) -> list[dict]:
    """Samples without masks, as a tokenised corpus is."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (n, length), generator=generator)
    return [{"input_ids": row.tolist()} for row in ids]


def labelled_sentences(n: int = 48, length: int = 12, seed: int = 0) -> list[dict]:
    """Samples in which every token is a label, as for causal models."""
    return [row | {"labels": row["input_ids"]} for row in sentences(n, length, seed)]


def masked_sentences(n: int = 48, length: int = 12, seed: int = 0) -> list[dict]:
    """Samples with fixed masks and uneven numbers of masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for row in sentences(n, length, seed):
        ids = torch.tensor(row["input_ids"])
        share = 0.1 + 0.6 * torch.rand((), generator=generator)
        masked = torch.rand(length, generator=generator) < share
        masked[0] = True
        labels = torch.where(masked, ids, -100)
        samples.append({"input_ids": torch.where(masked, 4, ids).tolist(), "labels": labels.tolist()})
    return samples


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer(VOCABULARY)


def make_arguments(folder: Path, /, **overrides) -> RecyclingArguments:
    """Arguments of a short quiet run."""
    values = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RecyclingArguments(**(values | overrides))


def run(
    folder: Path,
    /,
    *,
    resume=None,
    model=None,
    data=None,
    collator=None,
    evaluation=None,
    callbacks=None,
    cls=RecyclingTrainer,
    **overrides,
) -> RecyclingTrainer:
    """A finished run, by default of a tiny BERT on masked random text, with dynamic masks."""
    trainer = cls(
        model=tiny_bert() if model is None else model,
        args=make_arguments(folder, **overrides),
        train_dataset=sentences() if data is None else data,
        eval_dataset=evaluation,
        data_collator=DataCollatorForLanguageModeling(word_tokenizer()) if collator is None else collator,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def arguments(tmp_path):
    """`arguments(folder, **overrides)`: `make_arguments` with a folder of the test's own."""
    return lambda folder="run", **overrides: make_arguments(tmp_path / folder, **overrides)


@pytest.fixture
def train(tmp_path):
    """`train(folder, **overrides)`: `run` in a folder of the test's own."""
    return lambda folder="run", **overrides: run(tmp_path / folder, **overrides)


def end_workers(trainer) -> None:
    """Ends persistent workers of loaders. The garbage collection of a trainer would wait five seconds for each, because
    it closes their queues before it tells them to end."""
    for loader in trainer.accelerator._dataloaders:
        if loader.base_dataloader._iterator is not None:
            loader.base_dataloader._iterator._shutdown_workers()


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same_weights(first, second) -> None:
    """Bit for bit."""
    first, second = first.model.state_dict(), second.model.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs by {(value - second[name]).abs().max()}"
