"""`hf-recycle train` that publishes: what it says at the start and at the end."""

import datasets
import pytest
from hub_server import ALICE_READ, Fault
from support.english import english

from hf_recycle.cli.main import main


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_RECYCLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    text = tmp_path / "train.txt"
    text.write_text("\n".join(english(400)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "model_type: bert\ntokenizer_vocab_size: 300\nmax_seq_length: 32\nper_device_train_batch_size: 4\n"
        "config_overrides: hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32\n"
        "max_steps: 2\nsave_steps: 2\nlogging_steps: 1\nmax_eval_samples: 8\ndisable_tqdm: true\nuse_cpu: true\n"
        f"train_file: {text}\npush_to_hub: true\n"
    )
    return ["train", str(recipe), "--output_dir", str(tmp_path / "out")]


@pytest.mark.slow
def test_the_summary_says_what_was_not_published_and_how_to_publish_it(online, hub, words, tmp_path, capsys):
    hub.faults.set([Fault("/commit/", status=403, times=2)])
    assert main([*words, "--hub_model_id", "alice/summary"]) == 0
    summary = capsys.readouterr().out.partition("After 2 optimizer steps")[2]
    commands = [
        f"hf-recycle push {tmp_path}/out/unpublished/0001-checkpoint-2 alice/summary",
        f"hf-recycle push {tmp_path}/out alice/summary",
    ]
    assert hub.store.titles("alice/summary") == []
    for command in commands:
        assert f"{command}\n" in summary
        assert main(command.split()[1:]) == 0
    checkpoint, end = hub.store.titles("alice/summary")
    assert checkpoint.startswith("step 2, loss")
    assert "eval loss" in end


@pytest.mark.slow
def test_the_summary_does_not_ask_for_what_would_overwrite_a_newer_model(online, hub, words, tmp_path, capsys):
    hub.faults.set([Fault("/commit/", status=403, times=1)])
    assert main([*words, "--hub_model_id", "alice/summary-3"]) == 0
    summary = capsys.readouterr().out.partition("After 2 optimizer steps")[2]
    # The model that is saved at the end, with its evaluation, was published.
    (title,) = hub.store.titles("alice/summary-3")
    assert title.startswith("Model saved, step 2, loss")
    assert "eval loss" in title
    assert "hf-recycle push" not in summary
    assert not (tmp_path / "out" / "unpublished").exists()


def test_a_right_that_is_missing_ends_it_before_the_first_step(online, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", ALICE_READ)
    assert main([*words, "--hub_model_id", "alice/summary-2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "hub_model_id='alice/summary-2'" in error
    assert not list((tmp_path / "out").glob("checkpoint-*"))
