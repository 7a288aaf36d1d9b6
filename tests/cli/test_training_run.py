"""Whole runs of the command line, on a tiny model and a small text."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.english import english
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from hf_recycle import RecyclingHistory
from hf_recycle.cli.main import main

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(english(800)))
    return path


@pytest.fixture
def words(tmp_path, text_file):
    """A run of 8 steps with two selection phases; its output folder is `tmp_path / "out"`."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"# Tiny.\nmodel_type: bert\nconfig_overrides: {TINY}\ntrain_file: {text_file}\ntokenizer_vocab_size: 500\n"
        "max_seq_length: 32\nper_device_train_batch_size: 4\nmax_steps: 8\nsave_steps: 4\nlogging_steps: 4\n"
        "eval_strategy: steps\neval_steps: 4\nmax_eval_samples: 8\nrecycle_steps: 3\nrecycle_start: 3\n"
        "recycle_fraction: 0.25\nmagnitude_steps: 4\ndisable_tqdm: true\nuse_cpu: true\nlr_scheduler_type: constant\n"
    )
    return ["train", str(recipe), "--output_dir", str(tmp_path / "out")]


def weights(folder):
    return AutoModelForMaskedLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_train_save_report_and_never_mix_two_runs(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    printed = capsys.readouterr().out
    assert f"no checkpoint in {out} yet: starting from scratch" in printed
    assert "recycled at least once" in printed
    assert "unigram entropy" in printed
    assert f"AutoModelForMaskedLM.from_pretrained('{out}')" in printed
    assert {path.suffix for path in (out / "figures").iterdir()} <= {".png", ".svg"}
    assert len(list((out / "figures").iterdir())) >= 2

    model = AutoModelForMaskedLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 500
    assert tokenizer.model_max_length == 32
    history = RecyclingHistory.from_pretrained(out)
    assert sorted(set(history.events["step"])) == [3, 6]
    assert sum(counts.sum() for counts in history.counts.values()) == 2 * 8

    assert main(words) == 2
    assert f"error: output_dir={str(out)!r} already holds checkpoints of a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("figures_not_drawn")
def test_what_a_run_says_before_it_trains_and_how_its_folder_runs_it_again(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main([*words, "--dry_run"]) == 0
    planned = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert not out.exists()
    assert main(words) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # Before the banner DeepSpeed may say, once in a process, which device it has.
    said = said[[line.startswith("hf-recycle ") for line in said].index(True) :]

    parameters = (
        f"{sum(value.numel() for value in AutoModelForMaskedLM.from_pretrained(out).parameters()):,} parameters"
    )
    assert f"model BertForMaskedLM, {parameters}" in planned
    assert re.fullmatch(rf"hf-recycle \S+: BertForMaskedLM, {parameters}, 1 feed-forward block x 32 neurons", said[0])
    assert "device 1 x CPU, one process, float32" in said[:4]
    steps = sorted(set(RecyclingHistory.from_pretrained(out).events["step"]))
    for lines in (planned, said):
        assert "training 8 steps, each of 4 sequences x 32 tokens" in lines
        assert f"recycle at {len(steps)} steps: {', '.join(map(str, steps))}" in lines
        assert f"output_dir {out}" in lines

    assert main(["train", str(out / "config.yaml")]) == 2  # it never overwrites the run
    assert "already holds checkpoints of a run" in capsys.readouterr().err
    again = ["--output_dir", str(tmp_path / "again"), "-q"]
    monkeypatch.setattr("hf_recycle.cli.main.set_verbosity", lambda options: None)  # this process goes on
    assert main(["train", str(out / "config.yaml"), *again]) == 0
    assert capsys.readouterr().out.startswith("After 8 optimizer steps")
    assert (tmp_path / "again" / "config.yaml").read_text() == (out / "config.yaml").read_text().replace(
        f"output_dir: {out}", f"output_dir: {tmp_path / 'again'}"
    )
    one, two = weights(out), weights(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.usefixtures("figures_not_drawn")
def test_resumed_equals_uninterrupted(words, tmp_path, capsys):
    assert main(words) == 0
    whole = weights(tmp_path / "out")
    other = [*words[:-1], str(tmp_path / "other")]
    assert main([*other, "--max_steps", "4"]) == 0
    assert main([*other, "--resume_from_checkpoint", "true"]) == 0
    resumed = weights(tmp_path / "other")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    optimizer = Path(get_last_checkpoint(tmp_path / "other"), "optimizer.pt")
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    capsys.readouterr()
    assert main([*other, "--max_steps", "8", "--resume_from_checkpoint", "true"]) == 2
    errors = capsys.readouterr().err
    assert f"error: {optimizer}: it has " in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.usefixtures("figures_not_drawn")
def test_what_would_go_on_as_another_run_ends_in_a_sentence(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, "--max_steps", "4"]) == 0
    capsys.readouterr()

    def refused(*more):
        assert main([*words, *more, "--resume_from_checkpoint", "true"]) == 2
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if line.startswith("error: ") or "Traceback" in line]

    for more, said in [
        (("--seed", "7"), "seed=42 (now 7)"),
        (("--optim", "sgd"), "optimizer='AdamW' (now 'SGD')"),
        (("--per_device_train_batch_size", "8"), "batch_size=4 (now 8)"),
        (("--max_seq_length", "16"), "examples="),
    ]:
        (line,) = refused(*more, "--recycle_seed", "42")
        assert said in line
    kept = {name: (out / "checkpoint-4" / name).read_bytes() for name in ("optimizer.pt", "model.safetensors")}
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    (line,) = refused()
    assert "optimizer.pt" in line
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(kept["optimizer.pt"])
    others = kept["model.safetensors"].replace(b"intermediate.dense.weight", b"intermediate.other.weight")
    (out / "checkpoint-4" / "model.safetensors").write_bytes(others)
    (line,) = refused()
    assert "model.safetensors" in line or "intermediate.other.weight does not fit" in line
    (out / "checkpoint-4" / "model.safetensors").write_bytes(kept["model.safetensors"])
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("figures_not_drawn")
def test_a_trained_model_can_be_continued(words, tmp_path):
    assert main([*words, "--max_steps", "4"]) == 0
    again = ["--config_overrides", "null", "--model_name_or_path", str(tmp_path / "out"), "--max_steps", "4"]
    assert main([*words[:-1], str(tmp_path / "more"), *again]) == 0
    first, second = weights(tmp_path / "out"), weights(tmp_path / "more")
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    assert any(not torch.equal(first[name], second[name]) for name in first)
    # The vocabulary is the model's own, not one trained on the new text.
    assert (tmp_path / "more" / "tokenizer.json").read_text() == (tmp_path / "out" / "tokenizer.json").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("figures_not_drawn")
def test_streaming_and_line_by_line(words, tmp_path, text_file, capsys):
    assert main([*words, "--streaming"]) == 2
    assert "pass validation_file or eval_strategy=no" in capsys.readouterr().err
    streamed = ["--streaming", "--line_by_line", "--validation_file", str(text_file)]
    assert main([*words, *streamed]) == 0
    assert RecyclingHistory.from_pretrained(tmp_path / "out").events["step"].max() == 6


@pytest.mark.slow
@pytest.mark.usefixtures("figures_not_drawn")
def test_a_causal_model(words, tmp_path):
    gpt = ["--model_type", "gpt2", "--config_overrides", "n_embd=16,n_layer=1,n_head=2,n_positions=32", "--task", "clm"]
    assert main([*words, *gpt]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_embd == 16
    assert RecyclingHistory.from_pretrained(tmp_path / "out").events["step"].max() == 6


@pytest.mark.slow
def test_a_resume_path_that_is_no_checkpoint(words, tmp_path, capsys):
    """An empty folder, and that of a finished run, which has a model and a trainer state but no optimizer."""
    (tmp_path / "finished").mkdir()
    assert main([*words, "--resume_from_checkpoint", str(tmp_path / "finished")]) == 2
    (tmp_path / "finished" / "trainer_state.json").write_text("{}")
    assert main([*words, "--resume_from_checkpoint", str(tmp_path / "finished")]) == 2
    assert capsys.readouterr().err.count("is not a checkpoint that training can go on from") == 2


def test_an_output_dir_that_can_not_be_made(words, tmp_path, capsys):
    """Found out before anything is loaded."""
    path = tmp_path / "file"
    path.touch()
    assert main([*words, "--output_dir", str(path / "below")]) == 2
    assert re.search(
        r"output_dir='.*below' can't be written to \(Not a directory\); name another", capsys.readouterr().err
    )


def test_an_output_dir_that_is_a_file(words, tmp_path, capsys):
    path = tmp_path / "file.txt"
    path.write_text("text")
    assert main([*words, "--output_dir", str(path)]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_a_layer_that_the_model_does_not_have(words, capsys):
    assert main([*words, "--recycle_steps", "2", "--recycle_layers", "9"]) == 2
    assert "recycle_layers=[9] names block 9" in capsys.readouterr().err


def test_a_resume_path_that_does_not_exist(words, capsys):
    assert main([*words, "--resume_from_checkpoint", "gone"]) == 2
    assert "resume_from_checkpoint='gone' does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_says_how_to_go_on(words, tmp_path, number, status):
    command = [sys.executable, "-m", "hf_recycle.train", *words[1:], "--max_steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "checkpoint-4").is_dir():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert "Traceback" not in errors
    assert re.search(r"stopped; go on from the last checkpoint with: \S*hf-recycle train ", errors)
    assert errors.rstrip().endswith("--resume_from_checkpoint true")
