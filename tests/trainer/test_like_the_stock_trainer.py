"""With everything off, and in its loss, the trainer against the stock Trainer."""

import pytest
import torch
from support.tiny_runs import (
    assert_same_weights,
    losses,
    masked_sentences,
    sentences,
    tiny_bert,
    tiny_modernbert,
)
from transformers import (
    DataCollatorForLanguageModeling,
    FunnelConfig,
    FunnelForMaskedLM,
    Trainer,
    default_data_collator,
)
from transformers.utils import logging

from hf_recycle import RecyclingTrainer


@pytest.mark.parametrize("build", [tiny_bert, tiny_modernbert])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed masks", "stock masking"])
def test_everything_off_is_the_stock_trainer(build, accumulation, dynamic, arguments, tokenizer):
    """Training and evaluation, to the bit, and the collator."""
    args = arguments(
        masked_head=False, gradient_accumulation_steps=accumulation, max_steps=6, eval_strategy="steps", eval_steps=3
    )
    data = sentences() if dynamic else masked_sentences()
    collator = DataCollatorForLanguageModeling(tokenizer) if dynamic else default_data_collator
    trainers = []
    for cls in (Trainer, RecyclingTrainer):
        trainer = cls(model=build(), args=args, train_dataset=data, eval_dataset=data[:9], data_collator=collator)
        trainer.train()
        trainers.append(trainer)
    stock, ours = trainers
    assert losses(stock) == losses(ours)
    assert evaluations(stock) == evaluations(ours)
    assert [row.keys() for row in stock.state.log_history] == [row.keys() for row in ours.state.log_history]
    assert_same_weights(stock, ours)
    assert ours.data_collator is collator


def evaluations(trainer) -> list[float]:
    return [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]


def test_masked_head_gives_the_same_training(arguments):
    runs = []
    for masked_head in (False, True):
        trainer = RecyclingTrainer(
            model=tiny_bert(dropout=0.0),
            args=arguments(masked_head=masked_head, deterministic_masking=True),
            train_dataset=masked_sentences(),
        )
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("build", [lambda: tiny_bert(dropout=0.0), tiny_modernbert], ids=["bert", "modernbert"])
@pytest.mark.parametrize("masked_head", [False, True])
def test_accumulation_equals_one_large_batch(build, masked_head, arguments):
    """Uneven numbers of masked tokens: a mean of micro-batch means would differ. SGD, so that the gradient's scale
    shows in the weights (Adam would hide it)."""
    runs = []
    for batch, accumulation in ((16, 1), (4, 4)):
        trainer = RecyclingTrainer(
            model=build().double(),
            args=arguments(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                masked_head=masked_head,
                magnitude_steps=4,  # with everything off the loss would be the stock Trainer's
                optim="sgd",
                learning_rate=0.5,
                max_steps=4,
                max_grad_norm=0.7,
            ),
            train_dataset=masked_sentences(),
        )
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        # The loss is taken in float32 whatever the model.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_evaluation_loss_is_a_mean_over_masked_tokens(arguments):
    """Uneven batches of uneven samples, against one forward pass per sample of the full head."""
    data = masked_sentences(n=11)
    trainer = RecyclingTrainer(
        model=tiny_bert(), args=arguments(per_device_eval_batch_size=4), train_dataset=data, eval_dataset=data
    )
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    total, hits, tokens = 0.0, 0, 0
    with torch.no_grad():
        for sample in data:
            logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0].double()
            for position, label in enumerate(sample["labels"]):
                if label != -100:
                    total -= float(logits[position].log_softmax(-1)[label])
                    hits += int(logits[position].argmax() == label)
                    tokens += 1
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(hits / tokens)


def test_evaluation_masks_are_the_same_in_every_run(arguments, tokenizer):
    """Another seed, another moment, another batch size: the same masks, so the same loss of the same model."""
    seen = []
    for seed, batch in ((1, 3), (2, 8)):
        trainer = RecyclingTrainer(
            model=tiny_bert(),
            args=arguments(seed=seed, per_device_eval_batch_size=batch),
            train_dataset=sentences(),
            eval_dataset=sentences(17, seed=5),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )
        seen += [trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]]
    assert seen == pytest.approx([seen[0]] * 4, rel=1e-6)


def test_full_logits_where_they_are_asked_for(arguments):
    data = masked_sentences(n=8)
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    trainer = RecyclingTrainer(model=tiny_bert(), args=arguments(), eval_dataset=data, compute_metrics=compute_metrics)
    with_metrics = trainer.evaluate()
    predicted = trainer.predict(data)
    assert shapes == [(8, 12, 64), (8, 12, 64)]
    assert predicted.predictions.shape == (8, 12, 64)
    plain = RecyclingTrainer(model=tiny_bert(), args=arguments(), eval_dataset=data).evaluate()
    assert with_metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert "eval_accuracy" not in with_metrics
    assert "eval_accuracy" in plain


@pytest.mark.parametrize("extra", [{"label_smoothing_factor": 0.1}, {}], ids=["label smoothing", "compute_loss_func"])
def test_losses_of_the_users_own_get_the_full_head(extra, arguments):
    data = masked_sentences(n=16)

    def loss_func(outputs, labels, num_items_in_batch=None):
        assert outputs.logits.shape == (4, 12, 64)
        flat = torch.nn.functional.cross_entropy(outputs.logits.view(-1, 64), labels.view(-1), reduction="sum")
        return flat / num_items_in_batch

    keywords = {} if extra else {"compute_loss_func": loss_func}
    runs = []
    for cls in (Trainer, RecyclingTrainer):
        trainer = cls(model=tiny_bert(), args=arguments(max_steps=3, **extra), train_dataset=data, **keywords)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_unknown_head_falls_back_and_says_so_once(arguments, caplog):
    def model():
        torch.manual_seed(0)
        return FunnelForMaskedLM(
            FunnelConfig(vocab_size=64, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1])
        )

    runs = []
    for masked_head in (True, False):
        trainer = RecyclingTrainer(
            model=model(),
            args=arguments(max_steps=3, masked_head=masked_head, magnitude_steps=1, deterministic_masking=False),
            train_dataset=masked_sentences(),
        )
        logging.enable_propagation()
        try:
            trainer.train()
        finally:
            logging.disable_propagation()
        runs.append(losses(trainer))
    assert len([record for record in caplog.records if "full head" in record.getMessage()]) == 1
    assert runs[0] == runs[1]
