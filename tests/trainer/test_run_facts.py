"""What a trainer records of its run: true, scrubbed, never in the way of training."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_runs import assert_same_weights, tiny_bert

from hf_recycle import RecyclingTrainer
from hf_recycle.card.run_facts import run_facts, split_arguments
from hf_recycle.data.facts import facts_tokenizer
from hf_recycle.records import files
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.run_schema import run_problem
from hf_recycle.runs.context import run_context
from hf_recycle.runs.parse import parse_run

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ"
RUN = {"recycle_steps": 4, "recycle_fraction": 0.1}


def test_only_what_was_changed_counts_as_changed(arguments):
    given = {"learning_rate": 0.5, "recycle_steps": 4, "lr_scheduler_type": "constant", "eval_strategy": "steps"}
    changed, unchanged = split_arguments(arguments(**given, eval_steps=3, hub_token=TOKEN))
    common = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    assert changed == {**given, **common, "eval_steps": 3}
    assert unchanged["weight_decay"] == 0
    assert not changed.keys() & unchanged.keys()


def test_facts_hold_no_secret_and_fit_the_schema(arguments, monkeypatch):
    args = arguments(hub_token=TOKEN, run_name="of jane", lr_scheduler_kwargs={"path": "/home/jane/x"})
    trainer = RecyclingTrainer(model=tiny_bert(), args=args)
    trainer.run_context = {"command": f"hf-recycle train --hub_token {TOKEN}", "arguments": {"task": "mlm"}}
    facts = run_facts(trainer)
    text = json.dumps(facts)
    assert run_problem(facts) is None
    for secret in (TOKEN, "jane", args.output_dir):
        assert secret not in text
    assert facts["arguments"]["task"] == "mlm"
    assert facts["arguments"]["max_steps"] == 12
    assert facts["base_model"] is None
    assert facts["model"] == {
        "architecture": "BertForMaskedLM",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    assert facts["hardware"] == {"device": "CPU", "processes": 1, "engine": "one process", "precision": "float32"}


def test_the_mask_is_a_fact_and_no_secret(arguments):
    trainer = RecyclingTrainer(model=tiny_bert(), args=arguments(), processing_class=facts_tokenizer(4, 4))
    assert run_facts(trainer)["tokenizer"] == {"name": None, "vocabulary": 17, "mask": "[MASK]"}


def test_a_loaded_model_is_told_from_a_borrowed_configuration(arguments, tmp_path):
    fresh = tiny_bert()
    fresh.name_or_path = "lab/base"  # as from_config leaves it
    assert run_facts(RecyclingTrainer(model=fresh, args=arguments()))["base_model"] is None
    fresh.save_pretrained(tmp_path / "saved")
    loaded = type(fresh).from_pretrained(tmp_path / "saved")
    assert run_facts(RecyclingTrainer(model=loaded, args=arguments()))["base_model"] is None  # local
    loaded.name_or_path = "lab/base"
    assert run_facts(RecyclingTrainer(model=loaded, args=arguments()))["base_model"] == {
        "name": "lab/base",
        "revision": None,
    }


def test_tokens_and_time_add_up_over_a_resume(train, tmp_path):
    train("whole", save_strategy="steps", save_steps=6, gradient_accumulation_steps=2, **RUN)
    half = files.read_config(tmp_path / "whole/checkpoint-6")["run"]
    whole = files.read_config(tmp_path / "whole/checkpoint-12")["run"]
    assert half["tokens"] == 6 * 2 * 4 * 12  # steps, accumulation, batch, length
    assert whole["tokens"] == 2 * half["tokens"]
    resumed = train("resumed", resume=str(tmp_path / "whole/checkpoint-6"), gradient_accumulation_steps=2, **RUN)
    resumed.save_model()
    run = files.read_config(tmp_path / "resumed")["run"]
    assert run["tokens"] == whole["tokens"]
    assert run["seconds"] > half["seconds"] > 0
    # Time stops with training.
    resumed.save_model()
    assert files.read_config(tmp_path / "resumed")["run"]["seconds"] == run["seconds"]


@pytest.fixture
def warnings():
    """Messages of our loggers, which don't propagate."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("hf_recycle.checkpoints.writing")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_what_fails_beside_training_does_not_stop_it(train, tmp_path, monkeypatch, warnings):
    expected = train("expected", save_strategy="steps", save_steps=4, **RUN)

    def fail(*_, **__):
        raise RuntimeError("no font was found here")

    monkeypatch.setattr("hf_recycle.card.card.write_card", fail)
    monkeypatch.setattr("hf_recycle.checkpoints.writing.run_facts", lambda trainer: {"arguments": "not a mapping"})
    trainer = train("run", save_strategy="steps", save_steps=4, **RUN)
    assert_same_weights(trainer, expected)
    cards = {path.name for path in (tmp_path / "expected/checkpoint-12").iterdir()}
    present = {path.name for path in (tmp_path / "run/checkpoint-12").iterdir()}
    assert cards - present == {"README.md"}
    assert files.read_config(tmp_path / "run/checkpoint-12")["run"].keys() == {"seconds", "tokens"}
    assert sum("no font was found here" in message for message in warnings) == 1  # of three checkpoints


def test_the_card_of_a_checkpoint_is_whole_when_the_checkpoint_is(train, tmp_path):
    trainer = train("run", save_strategy="steps", save_steps=6, **RUN)
    card = (tmp_path / "run/checkpoint-6/README.md").read_text()
    assert "after 6 of 12 optimizer steps" in card
    assert "`BertForMaskedLM`" in card
    assert str(tmp_path) not in card
    trainer.save_model()
    assert "after 12 optimizer steps" in (tmp_path / "run/README.md").read_text()


def test_a_save_that_is_not_published_draws_nothing(train, tmp_path, monkeypatch):
    drawn = []
    for place in ("run.figure_images", "beside.figures_beside"):
        monkeypatch.setattr(f"hf_recycle.plots.{place}", lambda *_, place=place, **__: drawn.append(place) or {})
    trainer = train("run", save_strategy="steps", save_steps=4, **RUN)
    assert len(list((tmp_path / "run").glob("checkpoint-*/README.md"))) == 3
    assert drawn == []
    trainer.save_model()
    assert drawn == ["run.figure_images"]


def test_the_card_says_what_the_arguments_and_the_caller_tell(train, tmp_path):
    trainer = train("run", save_strategy="steps", save_steps=6, hub_license="mit", hub_language=["de"], **RUN)
    trainer.save_model()
    trainer.create_model_card(tags="tiny", dataset_tags="lab/books", dataset="Books")
    for folder, more in (("checkpoint-12", []), (".", ["tiny"])):
        data = ModelCard.load(tmp_path / "run" / folder / "README.md").data
        assert (data.license, data.language, data.get("widget")) == ("mit", ["de"], None)
        assert data.tags == ["hf_recycle", "neuron-recycling", "masked-lm", *more]
        assert data.datasets == (["lab/books"] if more else None)
    # Kept with the facts of the run, for whoever publishes a checkpoint elsewhere.
    run = files.read_config(tmp_path / "run/checkpoint-12")["run"]
    assert run["card"] == {"license": "mit", "language": ["de"]}


def test_the_command_line_says_what_the_trainer_does_not_know(tmp_path):
    texts = tmp_path / "my texts.txt"
    texts.write_text("one\ntwo\n")
    words = ["scale/laptop", "--train_file", str(texts), "--output_dir", str(tmp_path / "o"), "--hub_token", TOKEN]
    context = run_context(parse_run(words), words, 6.5)
    assert context["command"] == "hf-recycle train scale/laptop --train_file 'my texts.txt'"
    assert context["data"] == {"name": "my texts.txt", "datasets": [], "files": ["my texts.txt"]}
    assert context["arguments"]["train_file"] == "my texts.txt"
    assert context["arguments"]["model_type"] == "roberta-prelayernorm"
    assert (context["base_model"], context["unigram_entropy"]) == (None, 6.5)
    assert run_problem(context) is None
    assert str(tmp_path) not in json.dumps(context)
    hub = ["scale/laptop", "--dataset_name", "lab/books", "--output_dir", str(tmp_path / "o")]
    assert run_context(parse_run(hub), hub, None)["data"]["datasets"] == ["lab/books"]
    base = ["--model_name_or_path", "lab/base", "--output_dir", str(tmp_path / "o")]
    assert run_context(parse_run(base), base, None)["base_model"] == {"name": "lab/base", "revision": None}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(["command", "arguments", "model", "base_model", "data", "tokens"]), anything))
def test_facts_of_any_shape_are_taken_or_refused_in_a_sentence(tmp_path_factory, run):
    folder = Path(tmp_path_factory.getbasetemp()) / "config"
    folder.mkdir(exist_ok=True)
    config = {"format_version": FORMAT_VERSION, "package_version": "0", "arguments": {}, "blocks": [], "run": run}
    (folder / files.CONFIG_FILE).write_text(json.dumps(config))
    if run_problem(run) is None:
        assert files.read_config(folder)["run"] == run
    else:
        with pytest.raises(files.RecyclingFileError, match="run"):
            files.read_config(folder)


@pytest.mark.parametrize(
    "run",
    [
        [],
        {"tokens": -1},
        {"seconds": True},
        {"arguments": {"a": {"b": {"c": 1}}}},
        {"command": "x" * 5000},
        {"versions": {"torch": 2}},
        {"base_model": {"name": None}},
        {"unknown": "x" * 300_000},
    ],
)
def test_facts_that_are_refused(run):
    assert run_problem(run)
