"""Arguments count as they are when training begins, and a resumed run keeps the schedule that it began with."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_runs import assert_same_weights, losses, masked_sentences, sentences, tiny_bert, tiny_t5
from transformers import DataCollatorForLanguageModeling, integrations
from transformers.trainer_utils import HPSearchBackend

from hf_recycle import RecyclingHistory, RecyclingTrainer
from hf_recycle.checkpoints import file_list as checkpoint_list
from hf_recycle.records.files import RecyclingFileError
from hf_recycle.speed import onednn

PLAIN = {"recycle_steps": 2, "recycle_fraction": 0.25}


def trainer_with(args, **kwargs):
    return RecyclingTrainer(args=args, train_dataset=masked_sentences(), **({"model": tiny_bert(0.0)} | kwargs))


def phases(trainer):
    return [(row["step"], row["recycled"]) for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]


def test_an_argument_that_is_changed_after_construction(arguments):
    changed = trainer_with(arguments(max_steps=6, recycle_fraction=0.1, magnitude_steps=1))
    changed.args.recycle_steps, changed.args.recycle_fraction = 2, 0.25
    changed.args.midpoint_weight, changed.args.magnitude_steps = 0.5, None
    changed.train()
    expected = trainer_with(arguments(max_steps=6, midpoint_weight=0.5, **PLAIN))
    expected.train()
    assert_same_weights(changed, expected)
    assert phases(changed) == phases(expected) != []
    assert not any(row["kind"] == "magnitude" for row in changed.recorder.to_table().to_pylist())


def test_a_value_that_is_not_allowed_is_refused_also_later(arguments):
    trainer = trainer_with(arguments(max_steps=6, **PLAIN))
    trainer.args.recycle_fraction = 2
    with pytest.raises(ValueError, match=r"recycle_fraction=2 is not allowed: it must be a number in \(0, 1\]"):
        trainer.train()


def test_a_number_that_a_search_has_come_to_is_checked_too(arguments, monkeypatch):
    monkeypatch.setattr(integrations, "hp_params", lambda trial: trial.params)
    trainer = trainer_with(arguments(max_steps=6))
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: dict(trial.params)
    with pytest.raises(ValueError, match="learning_rate=inf is not allowed"):
        trainer.train(trial=SimpleNamespace(params={"learning_rate": float("inf")}, number=0))


@pytest.mark.parametrize("end", [{"masked_head": False}, {"recycle_steps": 2}, {"deterministic_masking": True}])
def test_batches_are_those_of_the_arguments_when_training_begins(end, arguments, tokenizer):
    """The stock Trainer's or reproducible ones, whatever the arguments were at construction."""

    def run(args, changes):
        collator = DataCollatorForLanguageModeling(tokenizer)
        trainer = RecyclingTrainer(model=tiny_bert(0.0), args=args, train_dataset=sentences(), data_collator=collator)
        for name, value in changes.items():
            setattr(trainer.args, name, value)
        trainer.train()
        return trainer

    begin = {} if end == {"masked_head": False} else {"masked_head": False}
    settings = {"max_steps": 4, "recycle_fraction": 0.25}
    changed = run(arguments(**settings | begin), end)
    expected = run(arguments(**settings | begin | end), {})
    assert losses(changed) == losses(expected)
    assert_same_weights(changed, expected)


def test_trials_of_a_hyperparameter_search_have_the_methods_of_their_own_arguments(arguments, monkeypatch):
    monkeypatch.setattr(integrations, "hp_params", lambda trial: getattr(trial, "params", {}))
    trainer = trainer_with(arguments(max_steps=6, **PLAIN), model=None, model_init=lambda: tiny_bert(0.0))
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: dict(trial.params)
    recycled = []
    for params in (
        {"recycle_fraction": 0.25},
        {"recycle_fraction": 0.5},
        {"recycle_steps": 3, "recycle_fraction": 0.25},
    ):
        trainer.train(trial=SimpleNamespace(params=params, number=len(recycled)))
        recycled.append(sum(int(counts.sum()) for counts in trainer.neuron_table().counts.values()))
    assert recycled == [2 * 2 * 8, 2 * 2 * 16, 2 * 8]


def test_another_seed_by_dataclasses_replace_is_that_of_the_method_too(arguments):
    args = arguments(max_steps=6, recycle_selection="random", **PLAIN)
    replaced = trainer_with(dataclasses.replace(args, seed=7))
    given = trainer_with(arguments(max_steps=6, recycle_selection="random", seed=7, **PLAIN))
    for trainer in (replaced, given):
        trainer.train()
    assert phases(replaced) == phases(given) != []


SHARES = {"recycle_steps": 0.25, "recycle_start": 0.25, "recycle_fraction": 0.25, "recycle_smooth_steps": 0.25}
DECAY = SHARES | {"recycle_fraction_schedule": "linear"}
PRUNING = {"prune_fraction": 0.5, "prune_start": 0.25, "prune_steps": 0.125}


@pytest.mark.parametrize("settings", [SHARES, DECAY, PRUNING])
def test_shares_of_the_steps_stay_what_they_were_when_a_longer_training_goes_on(arguments, said, settings):
    def train(max_steps, resume=None, **overrides):
        args = arguments(
            max_steps=max_steps, save_strategy="steps", save_steps=4, lr_scheduler_type="constant", **overrides
        )
        trainer = trainer_with(args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = train(8, **settings)
    folder = str(Path(first.args.output_dir, "checkpoint-4"))
    steps = {0.25: 2, 0.125: 1}
    whole = {name: steps.get(v, v) if "fraction" not in name else v for name, v in settings.items()}
    if settings is not SHARES:  # a decay and a course of pruning end where the training ended
        whole["recycle_end" if settings is DECAY else "prune_end"] = 8
    longer = train(12, folder, **settings)
    expected = train(12, **whole)
    assert_same_weights(longer, expected)
    assert phases(longer) == phases(expected)
    assert any("as when this run began" in text for text in said())


def test_the_resolved_schedule_is_in_the_checkpoint_and_the_same_steps_may_be_written_otherwise(arguments):
    args = arguments(max_steps=8, save_strategy="steps", save_steps=4, **SHARES)
    trainer_with(args).train()
    folder = Path(args.output_dir, "checkpoint-4")
    config = RecyclingHistory.from_pretrained(folder).config
    assert config["arguments"]["recycle_steps"] == 0.25
    assert (config["resolved"]["recycle_steps"], config["resolved"]["recycle_seed"]) == (2, args.seed)
    same = trainer_with(arguments(max_steps=8, **SHARES | {"recycle_steps": 2}))
    same.train(resume_from_checkpoint=str(folder))
    for settings, message in (
        ({"recycle_steps": 3}, r"recycle_steps=0\.25 \(now 3\)"),
        ({"seed": 5}, rf"recycle_seed={args.seed} \(now 5\)"),
        ({"recycle_fraction": 0.5}, r"recycle_fraction=0\.25 \(now 0\.5\)"),
    ):
        with pytest.raises(RecyclingFileError, match=message):
            trainer_with(arguments(max_steps=8, **SHARES | settings)).train(resume_from_checkpoint=str(folder))


# ---- What is no method's setting ----

ATTENTION = "attention.self.query -> attention.output.dense"
FIELDS = {
    "masked_head": (True, False),
    "recompute_activations": (True, False),
    "onednn_linear": (False, True),
    "deterministic_masking": (None, False),
    "ff_pattern": (None, ATTENTION),
    "ff_blocks": (None, "decoder"),
}


def what_it_does(trainer) -> dict:
    """Which batches a training gets, how it computes them, and what comes out."""
    model, batches, step = trainer.model, [], trainer.training_step
    ways, shapes = set(), []

    def noting(model, inputs, *args, **kwargs):
        batches.append({name: value.tolist() for name, value in inputs.items()})
        return step(model, inputs, *args, **kwargs)

    def look(*_):
        ways.update((n, type(vars(m)["forward"]).__name__) for n, m in model.named_modules() if "forward" in vars(m))

    trainer.training_step = noting
    model.get_input_embeddings().register_forward_hook(look)
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: shapes.append(logits.shape))
    trainer.train()
    blocks = [block.name for block in trainer.neuron_table().blocks]
    found = {"batches": batches, "ways": ways, "shapes": shapes, "blocks": blocks, "phases": phases(trainer)}
    return found | {"losses": losses(trainer)}


@pytest.mark.slow
@pytest.mark.parametrize("turned", ["on", "off"])
@pytest.mark.parametrize("name", FIELDS)
def test_any_field_counts_as_it_is_when_training_begins(name, turned, arguments, tokenizer, monkeypatch):
    if name == "onednn_linear" and not onednn.is_available():
        pytest.skip("this PyTorch is without oneDNN")
    monkeypatch.setattr(onednn, "_LEAST_WORK", 0)
    before, now = FIELDS[name] if turned == "on" else reversed(FIELDS[name])

    def build(value):
        return RecyclingTrainer(
            model=tiny_t5() if name == "ff_blocks" else tiny_bert(0.0),
            args=arguments(max_steps=4, **PLAIN, **{name: value}),
            train_dataset=masked_sentences() if name == "ff_blocks" else sentences(),
            data_collator=None if name == "ff_blocks" else DataCollatorForLanguageModeling(tokenizer),
        )

    changed = build(before)
    setattr(changed.args, name, now)
    found = what_it_does(changed)
    assert found == what_it_does(build(now))
    assert found != what_it_does(build(before))


@pytest.mark.parametrize("later", [{"masked_head": True}, PLAIN])
def test_a_trainer_that_stepped_aside_when_it_was_made(later, arguments, tokenizer):
    """Its batches and evaluations are those of the arguments as they are now."""

    def build(**settings):
        return RecyclingTrainer(
            model=tiny_bert(0.0),
            args=arguments(max_steps=2, **{"masked_head": False} | settings),
            train_dataset=sentences(),
            eval_dataset=sentences(9),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )

    changed, expected = build(), build(**later)
    assert changed.steps_aside
    for name, value in later.items():
        setattr(changed.args, name, value)
    assert changed.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
    assert what_it_does(changed) == what_it_does(expected)


@pytest.mark.parametrize("verify", [True, False])
def test_checksums_of_large_files(verify, arguments, monkeypatch):
    monkeypatch.setattr(checkpoint_list, "_SMALL", 0)
    trainer = trainer_with(arguments(max_steps=1, save_strategy="steps", save_steps=1, verify_checkpoint=not verify))
    trainer.args.verify_checkpoint = verify
    trainer.train()
    listed = json.loads(Path(trainer.args.output_dir, "checkpoint-1", checkpoint_list.LIST_FILE).read_text())
    assert all(("sha256" in entry) == verify for entry in listed["files"].values())


def test_onednn_that_is_not_there_is_refused_also_later(arguments, monkeypatch):
    trainer = trainer_with(arguments())
    monkeypatch.setattr("hf_recycle.trainer.trainer.is_available", lambda: False)
    trainer.args.onednn_linear = True
    with pytest.raises(ValueError, match="onednn_linear=True, but this PyTorch"):
        trainer.train()
