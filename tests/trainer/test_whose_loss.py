"""A loss of the user's, in whatever form, trains and evaluates as with the stock Trainer; a plain one is ours."""

import types

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from support.tiny_runs import assert_same_weights, losses, masked_sentences, sentences, tiny_bert, tiny_modernbert
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LukeConfig,
    LukeForMaskedLM,
    Trainer,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from hf_recycle import RecyclingTrainer
from hf_recycle.mlm.plain_loss import ignores_item_count, is_masked_language_model, plain_loss_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT

# Ours is switched on (something is recorded), and nothing else of ours can make a difference.
ON = {"magnitude_steps": 2, "deterministic_masking": False, "onednn_linear": False}


def like(model: nn.Module, cls: type) -> nn.Module:
    model.__class__ = cls
    return model


class WithTerm(BertForMaskedLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 10 * output.logits.square().mean()
        return output


class WithoutKeywords(BertForMaskedLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        output.loss = 2 * output.loss
        return output


def replaced_in_the_instance() -> nn.Module:
    model = tiny_bert()
    model.forward = types.MethodType(_with_term, model)
    return model


def _with_term(self, input_ids, labels=None, **kwargs):
    output = BertForMaskedLM.forward(self, input_ids, labels=labels, **kwargs)
    output.loss = output.loss + output.logits.square().mean()
    return output


def with_hook() -> nn.Module:
    def double(module, args, output):
        output.loss = 2 * output.loss

    model = tiny_bert()
    model.register_forward_hook(double)
    return model


def with_loss_function() -> nn.Module:
    def smooth(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        flat = logits.view(-1, vocab_size), labels.view(-1)
        return nn.functional.cross_entropy(*flat, label_smoothing=0.3, reduction="sum") / (num_items_in_batch or 7)

    model = tiny_modernbert()
    model.loss_function = smooth
    return model


def with_criterion() -> nn.Module:
    set_seed(7)
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32))
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.3)
    return model


MODELS = {
    "a forward that adds a term": lambda: like(tiny_bert(), WithTerm),
    "a forward without **kwargs": lambda: like(tiny_bert(), WithoutKeywords),
    "a forward of this model alone": replaced_in_the_instance,
    "a hook on the model": with_hook,
    "a loss_function": with_loss_function,
    "a criterion in the model": with_criterion,
}


class Tripled:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (3 * outputs.loss, outputs) if return_outputs else 3 * outputs.loss


class Penalised:
    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        return (result[0] + 100, result[1]) if isinstance(result, tuple) else result + 100


class MaskedThere:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        hidden = ids % 3 == 0
        outputs = model(input_ids=ids.masked_fill(hidden, 4), labels=ids.masked_fill(~hidden, -100))
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class MaskedInTheStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        hidden = inputs["input_ids"] % 3 == 0
        inputs["labels"] = inputs["input_ids"].masked_fill(~hidden, -100)
        return super().training_step(model, inputs, num_items_in_batch)


class OwnSteps:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = 2 * model(**{name: value.to(self.args.device) for name, value in inputs.items()}).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnScale:
    loss_is_scaled_for_ga = False


def squared(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().sum() / num_items_in_batch if num_items_in_batch else outputs.logits.square().mean()


TRAINERS = {
    "compute_loss": (Tripled, {}),
    "a compute_loss that calls ours": (Penalised, {}),
    "a step": (OwnSteps, {}),
    "a scale": (OwnScale, {}),
    "compute_loss_func": (object, {"compute_loss_func": squared}),
}


def trained(mixin, base, model, args, **more):
    cls = base if mixin is object else type("Mine", (mixin, base), {})
    data = masked_sentences(19)
    trainer = cls(model=model, args=args, train_dataset=data, eval_dataset=data[:7], **more)
    trainer.train()
    return trainer


def assert_trained_alike(arguments, mixin, build, more, **settings):
    args = arguments(
        max_steps=3,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="loss",
        **ON,
        **settings,
    )
    stock, ours = (trained(mixin, base, build(), args, **more) for base in (Trainer, RecyclingTrainer))
    assert losses(ours) == losses(stock)
    assert_same_weights(ours, stock)
    assert ours.state.best_metric == stock.state.best_metric
    predicted, expected = (trainer.predict(masked_sentences(5)) for trainer in (ours, stock))
    assert predicted.metrics["test_loss"] == expected.metrics["test_loss"]
    assert predicted.metrics.keys() == expected.metrics.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_a_loss_of_its_own(name, arguments):
    assert plain_loss_of(MODELS[name]()) is None
    assert_trained_alike(arguments, object, MODELS[name], {})


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_with_a_loss_of_its_own(name, arguments):
    mixin, more = TRAINERS[name]
    if mixin is OwnSteps:  # its steps are the user's, but evaluation is of a plain loss, over all masked tokens
        args = arguments(max_steps=3, **ON)
        runs = [trained(mixin, base, tiny_bert(), args) for base in (Trainer, RecyclingTrainer)]
        assert losses(runs[0]) == losses(runs[1])
        assert_same_weights(*runs)
    else:
        assert_trained_alike(arguments, mixin, tiny_bert, more)


def test_label_smoothing(arguments):
    assert_trained_alike(arguments, object, tiny_bert, {}, label_smoothing_factor=0.2)


@pytest.mark.parametrize("mixin", [MaskedThere, MaskedInTheStep])
def test_masks_made_by_a_subclass(mixin, arguments):
    runs = []
    for base in (Trainer, RecyclingTrainer):
        trainer = type("Mine", (mixin, base), {})(
            model=tiny_bert(0.0), args=arguments(max_steps=3, **ON), train_dataset=sentences()
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_an_evaluation_step_of_the_users(arguments):
    class Shifted:
        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            return loss + 100, logits, labels

    data, found = masked_sentences(11), []
    for base in (Trainer, RecyclingTrainer):
        trainer = type("Mine", (Shifted, base), {})(model=tiny_bert(), args=arguments(**ON), eval_dataset=data)
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if "time" not in name and "second" not in name})
    assert found[0] == found[1]
    assert found[0]["eval_loss"] > 100


@pytest.mark.parametrize("names", [("loss", "perplexity"), ("eval_perplexity", "accuracy"), ()])
def test_results_of_compute_metrics_stay(names, arguments):
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(**ON),
        eval_dataset=masked_sentences(9),
        compute_metrics=lambda _: dict.fromkeys(names, -1.0),
    )
    compute = trainer.compute_metrics
    metrics = trainer.evaluate()
    assert trainer.compute_metrics is compute
    for name in ("loss", "perplexity", "accuracy"):
        users = name in names or f"eval_{name}" in names
        assert (metrics.get(f"eval_{name}") == -1.0) == users
    assert metrics["eval_loss"] == -1.0 or metrics["eval_loss"] > 4


# ---- What is known ----


class Renamed(BertForMaskedLM):
    """Nothing of forward is changed."""


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        return self.inner(input_ids, attention_mask=attention_mask, labels=labels)


def lora(model: nn.Module) -> nn.Module:
    set_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=["query", "value"], lora_dropout=0.0))


def pretraining() -> nn.Module:
    config = tiny_bert().config
    set_seed(7)
    return BertForPreTraining(config)


def luke() -> nn.Module:
    set_seed(7)
    return LukeForMaskedLM(
        LukeConfig(vocab_size=64, entity_vocab_size=8, hidden_size=16, entity_emb_size=8, num_hidden_layers=1,
                   num_attention_heads=2, intermediate_size=32, max_position_embeddings=20)
    )  # fmt: skip


def test_what_is_known():
    """For certain plain / known to ignore the number of items."""
    ada = get_peft_model(
        tiny_bert(), AdaLoraConfig(target_modules=["query"], total_step=9, task_type="FEATURE_EXTRACTION")
    )
    prompt = get_peft_model(tiny_bert(), PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"))
    for model, plain, ignores in [
        (tiny_bert(), True, False),
        (tiny_modernbert(), True, False),
        (like(tiny_bert(), Renamed), True, False),
        (lora(tiny_bert()), True, True),
        (ada, False, True),
        (prompt, False, True),
        (Wrapper(tiny_bert()), False, True),
        (pretraining(), False, True),
        (luke(), False, True),
        (like(tiny_bert(), WithTerm), False, False),
        (Wrapper(like(tiny_bert(), WithTerm)), False, False),
    ]:
        assert (plain_loss_of(model) == "mlm", ignores_item_count(model)) == (plain, ignores), type(model).__name__
        assert is_masked_language_model(model)
    assert not is_masked_language_model(nn.Linear(2, 2))


COMMON = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, **ON}


@pytest.mark.parametrize("build", [lambda: like(tiny_bert(0.0), Renamed), lambda: lora(tiny_bert(0.0))],
                         ids=["a subclass that changes nothing", "LoRA"])  # fmt: skip
@pytest.mark.parametrize("masked_head", [True, False])
def test_a_plain_loss_is_that_of_one_large_batch(build, masked_head, arguments):
    """Against the stock Trainer without accumulation, where its loss is right."""
    data, runs = masked_sentences(), []
    for base, size, steps in ((Trainer, 12, 1), (RecyclingTrainer, 12, 1), (RecyclingTrainer, 4, 3)):
        args = arguments(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, masked_head=masked_head, **COMMON
        )
        trainer = base(model=build(), args=args, train_dataset=data, data_collator=default_data_collator)
        trainer.train()
        runs.append(trainer)
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-5)
        for (name, a), b in zip(run.model.named_parameters(), runs[0].model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_the_stock_trainer_inflates_the_loss_of_bert_by_accumulation_steps(arguments):
    """As README says of this version of transformers."""
    found = []
    for size, steps in ((12, 1), (4, 3)):
        settings = COMMON | {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = Trainer(tiny_bert(0.0), arguments(**settings), train_dataset=masked_sentences(12))
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[1] / found[0] == pytest.approx(3, rel=0.05)  # and a mean of means


@pytest.mark.parametrize("build", [pretraining, lambda: Wrapper(tiny_bert())], ids=["BertForPreTraining", "a wrapper"])
def test_a_known_loss_with_more_to_it_is_a_mean_over_accumulated_batches(build, arguments):
    data = [{**row, "next_sentence_label": i % 2} for i, row in enumerate(masked_sentences(12))]
    runs = []
    for size, steps in ((4, 3), (12, 1)):
        args = arguments(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, **COMMON | {"max_steps": 1}
        )
        set_seed(1)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer = RecyclingTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
        runs.append(losses(trainer)[0])
    assert runs[0] == pytest.approx(runs[1], abs=0.05)  # a mean of means


@pytest.mark.parametrize(
    ("mixin", "build", "settings", "said"),
    [
        (object, lambda: like(tiny_bert(), WithTerm), {"gradient_accumulation_steps": 3}, True),
        (Penalised, tiny_bert, {"gradient_accumulation_steps": 3}, True),
        (object, tiny_bert, {"gradient_accumulation_steps": 3, "masked_head": False, "magnitude_steps": None}, True),
        (object, lambda: like(tiny_bert(), WithTerm), {}, False),
        (object, tiny_bert, {"gradient_accumulation_steps": 3}, False),
        (Penalised, tiny_modernbert, {"gradient_accumulation_steps": 3}, False),
        (OwnScale, lambda: like(tiny_bert(), WithTerm), {"gradient_accumulation_steps": 3}, False),
    ],
)
def test_a_loss_that_is_inflated_is_said_once(mixin, build, settings, said, arguments, caplog):
    logging.enable_propagation()
    try:
        trained(mixin, RecyclingTrainer, build(), arguments(**{"max_steps": 2, **ON, **settings}))
    finally:
        logging.disable_propagation()
    found = [record.getMessage() for record in caplog.records if "times too large" in record.getMessage()]
    assert len(found) == said
    assert all("are 3 times too large" in text and "accepts_loss_kwargs = False" in text for text in found)
