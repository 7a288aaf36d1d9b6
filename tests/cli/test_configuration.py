"""`train --print_config`, and `config.yaml` in the folder of a run."""

import dataclasses

import pytest
import yaml
from transformers import TrainerState

from hf_recycle.cli.main import main
from hf_recycle.hub.push.layout import checkpoint_files, model_files
from hf_recycle.runs import announcement
from hf_recycle.runs.configuration import CONFIG_FILE, save_configuration
from hf_recycle.runs.launcher import LAUNCH_WORDS
from hf_recycle.runs.parse import parse_run
from hf_recycle.utils.yaml_loader import RecipeDumper, RecipeLoader

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recycle_layers: [0, 2]\nlearning_rate: 1e-7\neval_strategy: no\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
    )
    return str(path)


def same(one, other):
    parts = (one.model, other.model), (one.data, other.data), (one.training, other.training)
    for mine, theirs in parts:
        for item in dataclasses.fields(mine):
            assert getattr(mine, item.name) == getattr(theirs, item.name), item.name


def test_print_config_is_the_same_run_as_a_recipe(recipe, tmp_path, capsys):
    words = ["demo", recipe, "--run_name", "1e-7", "--max-steps", "12", "--masked_head", "false", "--seed", "3"]
    assert main(["train", *words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    same(parse_run(words), parse_run([str(path)]))
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "printed.yaml"}


def test_print_config_says_where_every_value_comes_from(recipe, capsys):
    assert main(["train", "demo", recipe, "--max_steps", "12", "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sources = {line.partition(":")[0]: line.rpartition("  # ")[2] for line in lines}
    assert sources["model_type"] == "recipe demo"
    assert sources["recycle_layers"] == f"recipe {recipe}"
    assert sources["max_steps"] == "command line"
    assert sources["output_dir"] == "default, named after the recipes"
    assert sources["adam_beta1"] == "default"
    arguments = parse_run(["demo"])
    every = {
        item.name for part in (arguments.model, arguments.data, arguments.training) for item in dataclasses.fields(part)
    }
    assert every - {"hub_token"} - {
        item.name for item in dataclasses.fields(arguments.training) if not item.init
    } <= set(sources)


def test_print_config_refuses_what_a_run_refuses(capsys):
    assert main(["train", "demo", "--recycle_fraction", "2", "--print_config"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "recycle_fraction=2.0 is not allowed" in printed.err


def test_no_token_is_printed_or_saved(tmp_path, capsys):
    words = ["demo", "--hub_token", TOKEN, "--run_name", f"run with {TOKEN}", "--output_dir", str(tmp_path)]
    assert main(["train", *words, "--print_config"]) == 0
    assert TOKEN not in capsys.readouterr().out
    save_configuration(parse_run(words), tmp_path)
    assert TOKEN not in (tmp_path / CONFIG_FILE).read_text()


def test_a_run_that_is_interrupted_at_once_has_its_recipe(tmp_path, monkeypatch):
    arguments = parse_run(["demo", "--output_dir", str(tmp_path)])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(announcement, "banner", interrupted)
    with pytest.raises(KeyboardInterrupt):
        announcement.Announcement(None, arguments).on_train_begin(arguments.training, TrainerState(), None)
    same(arguments, parse_run([str(tmp_path / CONFIG_FILE)]))


def test_the_saved_recipe_tells_the_command_with_its_processes(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCH_WORDS, "--accelerate_config zero2 --num_processes 2")
    save_configuration(parse_run(["demo"]), tmp_path)
    command = "hf-recycle train config.yaml --output_dir ANOTHER --accelerate_config zero2 --num_processes 2"
    assert f"{command}\n" in (tmp_path / CONFIG_FILE).read_text()


def test_the_saved_recipe_makes_the_same_run(recipe, tmp_path):
    words = ["demo", recipe, "--max_steps", "12", "--output_dir", str(tmp_path / "out")]
    save_configuration(parse_run([*words, "--resume_from_checkpoint", "true"]), tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text()
    same(parse_run(words), parse_run([str(tmp_path / CONFIG_FILE)]))
    assert yaml.safe_load(text)["max_steps"] == 12
    assert "resume_from_checkpoint" not in text


def test_it_stays_on_this_machine(tmp_path):
    """It names local files and folders: what is published is the card, and the recycling files."""
    for name in (CONFIG_FILE, "config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert model_files(tmp_path) == checkpoint_files(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "value", ["1e-7", "no", "on", "1e5", 1e-7, "true", True, None, "null", "a: b", "#", [1, "2"], {"a": 1e-9}]
)
def test_what_the_dumper_writes_the_loader_reads(value):
    read = yaml.load(yaml.dump([value], Dumper=RecipeDumper), RecipeLoader)
    assert read == [value]
    assert type(read[0]) is type(value)
