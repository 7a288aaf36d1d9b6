"""The trainer where a `Trainer` is expected: signatures, batches, and what may be called before training."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_runs import masked_sentences, sentences, tiny_bert
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel, Trainer

from hf_recycle import RecyclingHistory, RecyclingTrainer

ROOT = Path(__file__).parents[2]
OVERRIDDEN = [
    name
    for name, value in inspect.getmembers_static(RecyclingTrainer, callable)
    if hasattr(Trainer, name) and value is not inspect.getattr_static(Trainer, name) and name != "_run_epoch"
]


def signature(cls, name):
    parameters = inspect.signature(getattr(cls, name)).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_same_signature(name):
    assert signature(RecyclingTrainer, name) == signature(Trainer, name)


def test_what_is_compared():
    assert {"__init__", "train", "compute_loss", "evaluation_loop", "create_model_card", "_save_checkpoint"} <= set(
        OVERRIDDEN
    )


def test_arguments_by_position(arguments):
    """As a subclass passes them on."""

    class Passing(RecyclingTrainer):
        def evaluation_loop(
            self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
        ):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

        def _run_epoch(self, *args, **kwargs):
            names = list(inspect.signature(Trainer._run_epoch).parameters)[1:]
            return super()._run_epoch(*args, *(kwargs.pop(name) for name in names[len(args) :]))

    data = masked_sentences(8)
    trainer = Passing(tiny_bert(), arguments(max_steps=2, magnitude_steps=1), None, data, data)
    trainer.train(None, None, ["hidden_states"])
    assert trainer.evaluate(None, None, "mine")["mine_loss"] > 0


def test_batches_hold_tensors_only_and_the_collator_is_the_users(arguments, tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer)
    data = sentences(8)
    trainer = RecyclingTrainer(
        tiny_bert(), arguments(magnitude_steps=1), collator, data, data, processing_class=tokenizer
    )
    stock = Trainer(tiny_bert(), arguments(), DataCollatorForLanguageModeling(tokenizer), data, data)
    for name in ("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader"):
        given = [data] if name == "get_test_dataloader" else []
        batch, expected = (next(iter(getattr(t, name)(*given))) for t in (trainer, stock))
        assert type(batch) is type(expected)
        assert batch.keys() == expected.keys()
        assert all(isinstance(value, torch.Tensor) for value in batch.values())
        trainer.model(**{key: value.to("cpu") for key, value in batch.items()})
    assert trainer.data_collator is collator


def test_the_loaders_datasets_are_views_of_the_users_where_masks_are_functions_of_the_example(arguments):
    data = masked_sentences(8)
    for settings, own in (({"masked_head": False}, True), ({"deterministic_masking": False}, True), ({}, False)):
        trainer = RecyclingTrainer(tiny_bert(), arguments(**settings), train_dataset=data, eval_dataset=data)
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
            assert (loader.dataset is data) == own
            assert len(loader.dataset) == len(data)


def test_the_collator_can_be_replaced(arguments):
    def constant(examples):
        return {"input_ids": torch.full((len(examples), 5), 7), "labels": torch.full((len(examples), 5), 8)}

    trainer = RecyclingTrainer(
        tiny_bert(), arguments(max_steps=1, magnitude_steps=1), train_dataset=sentences(4), eval_dataset=sentences(4)
    )
    trainer.data_collator = constant
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert (next(iter(loader))["labels"] == 8).all()
    trainer.train()
    assert trainer.data_collator is constant


def test_the_callbacks_are_the_stock_trainers_while_no_method_is_on(arguments):
    """Also where methods are switched on and off again between trainings."""

    def names(trainer):
        return [type(callback).__name__ for callback in trainer.callback_handler.callbacks]

    data = masked_sentences(8)
    stock = names(Trainer(tiny_bert(), arguments(), train_dataset=data))
    trainer = RecyclingTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=data)
    assert names(trainer) == stock
    for steps, expected in ((1, [*stock, "NeuronMethods"]), (None, stock)):
        trainer.args.magnitude_steps = steps
        trainer.train()
        assert names(trainer) == expected
    assert names(RecyclingTrainer(tiny_bert(), arguments(magnitude_steps=1))) == [*stock, "NeuronMethods"]


METHODS = {
    "off": {"masked_head": False},
    "recycling": {"recycle_steps": 2, "recycle_immunity": 2, "recycle_smooth_steps": 2},
    "pruning": {"prune_fraction": 0.1},
    "overtraining": {"overtrain_steps": 2, "overtrain_batches": 1},
    "midpoint": {"midpoint_weight": 0.1},
    "magnitudes": {"magnitude_steps": 1},
}


@pytest.mark.parametrize("method", METHODS)
def test_saving_before_training(method, arguments):
    trainer = RecyclingTrainer(tiny_bert(), arguments(**METHODS[method]), train_dataset=masked_sentences(8))
    trainer.save_model()
    history = RecyclingHistory.from_pretrained(trainer.args.output_dir)
    assert history.stats["step"] == 0
    assert type(tiny_bert()).from_pretrained(trainer.args.output_dir).config.vocab_size == 64
    assert Path(trainer.args.output_dir, "README.md").is_file()


WORDS = {
    "language": "en",
    "license": "mit",
    "tags": ["mine"],
    "model_name": "My model",
    "finetuned_from": "lab/base",
    "tasks": "fill-mask",
    "dataset_tags": ["lab/a", "lab/b"],
    "dataset": ["Corpus A", "Corpus B"],
    "dataset_args": ["config: raw"],
}


def header(trainer) -> dict:
    return yaml.safe_load(Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8").split("---\n")[1])


@pytest.mark.parametrize("by_position", [False, True])
def test_a_card_says_what_its_maker_tells_before_and_after_training(by_position, arguments):
    def write():
        if by_position:
            trainer.create_model_card(*WORDS.values())
        else:
            trainer.create_model_card(**WORDS)

    data = masked_sentences(8)
    trainer = RecyclingTrainer(
        tiny_bert(), arguments(max_steps=2, recycle_steps=1), train_dataset=data, eval_dataset=data
    )
    write()
    text = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert not [words for value in WORDS.values() for words in [value] * isinstance(value, str) if words not in text]
    trainer.train()
    trainer.evaluate()
    trainer.save_model()  # a card that nobody tells anything
    found = [header(trainer)]
    write()
    found.append(header(trainer))
    assert found[0] == found[1]
    assert (found[0]["language"], found[0]["license"], found[0]["base_model"]) == ("en", "mit", "lab/base")
    assert found[0]["pipeline_tag"] == "fill-mask"
    assert {"mine", "hf_recycle"} <= set(found[0]["tags"])
    assert found[0]["datasets"] == ["lab/a", "lab/b"]
    [index] = found[0]["model-index"]
    assert index["name"] == "My model"
    datasets = [(r["dataset"]["name"], r["dataset"]["type"], r["dataset"].get("args")) for r in index["results"]]
    assert datasets == [("Corpus A", "lab/a", "config: raw"), ("Corpus B", "lab/b", None)]
    text = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert "# My model" in text
    assert "Trained on `Corpus A`, `Corpus B`." in text


def test_a_model_without_blocks_has_the_stock_card(arguments):
    class Readout(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.config = torch.nn.Linear(2, 2), GPT2Config()

        def forward(self, x, labels=None):
            return {"loss": self.linear(x).square().mean()}

    data = [{"x": torch.ones(2), "labels": 0}] * 4
    trainer = RecyclingTrainer(Readout(), arguments(max_steps=1, masked_head=False), train_dataset=data)
    trainer.train()
    trainer.create_model_card(model_name="Just a readout")
    assert "# Just a readout" in Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")


def test_a_causal_model_is_trained_and_evaluated_as_by_the_stock_trainer(arguments):
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences(10)]
    found = []
    for cls in (Trainer, RecyclingTrainer):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16))
        args = arguments(max_steps=2, gradient_accumulation_steps=2, masked_head=False)
        trainer = cls(model, args, train_dataset=data, eval_dataset=data)
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        found[-1].append(trainer.evaluate()["eval_loss"])
    assert found[0] == found[1]


def test_the_tests_that_the_page_names_are_there():
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs/drop-in.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = [re.findall(r"`(tests/[\w/.]+)`", row) for row in rows if not re.match(r"\| ?(what|---|-)", row)]
    assert len(named) > 8
    assert all(tests and all((ROOT / test).is_file() for test in tests) for tests in named)
