"""Where a run lies: the folder that was named, wherever the process goes, and whatever its name begins with."""

import shlex
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_recycle import RecyclingArguments
from hf_recycle.hub.push.job import Push
from hf_recycle.utils.command_words import path_word


def test_a_relative_folder_survives_a_change_of_the_working_directory(train, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    class Wanders(TrainerCallback):
        """As a script that changes into the folder of its data."""

        def on_train_begin(self, *args, **kwargs):
            monkeypatch.chdir(elsewhere)

    monkeypatch.chdir(tmp_path)
    settings = {"output_dir": "-run", "save_strategy": "steps", "save_steps": 2, "recycle_steps": 2}
    train(max_steps=2, callbacks=[Wanders()], **settings)
    assert list(elsewhere.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    assert get_last_checkpoint("-run") == "-run/checkpoint-2"
    resumed = train(max_steps=4, resume="-run/checkpoint-2", callbacks=[Wanders()], **settings)
    resumed.save_model()
    assert (tmp_path / "-run" / "model.safetensors").is_file()
    assert (tmp_path / "-run" / "checkpoint-4").is_dir()
    assert list(elsewhere.iterdir()) == []


def test_arguments_know_the_folder_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RecyclingArguments("run", use_cpu=True).output_dir == str(tmp_path / "run")


def test_a_path_in_a_command_is_never_an_option():
    for path in ("-run", "-rf/unpublished/0001-checkpoint-4", "./-x"):
        word = path_word(path)
        assert not word.startswith("-")
        assert Path(word) == Path(path)
        command = shlex.split(Push(Path(path), "user/repo", "message", staged=True).command)
        assert command[:2] == ["hf-recycle", "push"]
        assert command[2] == word
    assert path_word("runs/demo") == str(Path("runs/demo"))
