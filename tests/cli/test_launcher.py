"""The launch options of the command line, without starting anything."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_recycle.cli.main import main
from hf_recycle.engines.launch import EXPECTED_PROCESSES
from hf_recycle.errors import UserError
from hf_recycle.runs import launcher
from hf_recycle.runs.launcher import (
    LAUNCH_OPTIONS,
    accelerate_configs,
    find_accelerate_config,
    launch,
)
from hf_recycle.runs.recipes import recipe_names
from hf_recycle.utils.recipe_files import recipe_root


@pytest.fixture
def started(monkeypatch):
    """The command lines that would have been launched."""
    commands = []
    monkeypatch.setattr(launcher, "_accelerate_launch", lambda command: commands.append(command) or 0)
    # Set by launch; restored after the test.
    for name in (EXPECTED_PROCESSES, launcher.LAUNCH_WORDS):
        monkeypatch.setenv(name, "")
    return commands


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerate_config"], "argument --accelerate_config: expected one argument"),
        (["--accelerate_config", "--use_cpu"], "argument --accelerate_config: expected one argument"),
        (
            ["--accelerate_config", "ddp", "--num_processes", "two"],
            "argument --num_processes: invalid int value: 'two'",
        ),
        (
            ["--num-processes", "2"],
            "--num_processes goes with --accelerate_config: name one of ddp, fsdp2, zero2, zero3",
        ),
    ],
)
def test_launch_options_that_cannot_work(words, message, started, capsys):
    assert main(["train", "demo", *words]) == 2
    assert message in capsys.readouterr().err
    assert not started


def test_the_packaged_configurations_are_no_recipes():
    assert accelerate_configs() == ["ddp", "fsdp2", "zero2", "zero3"]
    assert not [name for name in recipe_names() if "accelerate" in name]
    with pytest.raises(UserError, match=r"accelerate_config='zero4' .* did you mean zero3\?"):
        find_accelerate_config("zero4")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_packaged_configurations(name):
    config = load_config_from_file(str(find_accelerate_config(name)))
    # How many is for the command line to say.
    assert config.num_processes == -1
    assert not config.use_cpu
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_command_that_is_launched(started, tmp_path):
    words = ["--recycle_layers", "0", "1", "--num-processes=2", "--seed", "3", "--accelerate_config", "zero3"]
    assert main(["train", "demo", *words]) == 0
    [command] = started
    assert command[:2] == ["--config_file", str(recipe_root() / "accelerate" / "zero3.yaml")]
    assert command[2:6] == ["--num_processes", "2", "--main_process_port", "0"]
    assert command[6:] == ["-m", "hf_recycle.train", "demo", "--recycle_layers", "0", "1", "--seed", "3"]

    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    machines = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29501}
    assert launch({"accelerate_config": str(own)} | machines, ["demo"]) == 0
    command = started[1]
    assert command[command.index("--num_processes") + 1] == "4"
    assert all(command[command.index(f"--{name}") + 1] == str(value) for name, value in machines.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 0}, "num_processes=0 must be at least 1"),
        ({"num_processes": 2, "machine_rank": -1}, "machine_rank=-1 must be at least 0"),
        ({}, "no device is visible: say how many processes to start with --num_processes"),
    ],
)
def test_numbers_that_cannot_work(options, message, started, monkeypatch):
    monkeypatch.setattr(launcher, "_devices", lambda: 0)
    with pytest.raises(UserError, match=message):
        launch({"accelerate_config": "ddp"} | options, [])
    assert not started


def test_one_process_for_each_visible_device(started, monkeypatch):
    monkeypatch.setattr(launcher, "_devices", lambda: 8)
    launch({"accelerate_config": "ddp", "num_machines": 2}, [])
    command = started[0]
    assert command[command.index("--num_processes") + 1] == "16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\n", "could not be read: A `distributed_type` must be specified"),
        ("- 1\n", "could not be read"),
        ("distributed_type: MULTI_CPU\nuse_cpu: true\n", "distributed_type=MULTI_CPU, with which .* one process only"),
        ("distributed_type: 'NO'\n", "distributed_type=NO, with which .* one process only"),
    ],
)
def test_configurations_that_cannot_work(text, message, started, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        launch({"accelerate_config": str(path), "num_processes": 2}, [])
    assert not started


def test_a_launch_inside_a_launch(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "demo", "--accelerate_config", "ddp"]) == 2
    assert "starts the processes itself; leave it out under accelerate launch" in capsys.readouterr().err


def test_the_help_and_the_suggestions_know_them(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in LAUNCH_OPTIONS)
    assert main(["train", "demo", "--acelerate_config", "ddp"]) == 2
    assert "did you mean --accelerate_config?" in capsys.readouterr().err
