"""What is read together was saved together, also while it is saved."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from simulated_runs import write_run

from hf_recycle import RecyclingHistory
from hf_recycle.records import file_set, files
from hf_recycle.records.file_set import read_files, remove_half_saved, write_files
from hf_recycle.records.files import RecyclingFileError


@pytest.fixture
def saves(tmp_path):
    """Two saves of one run."""
    contents = []
    for number in (1, 2):
        folder = tmp_path / f"source-{number}"
        folder.mkdir()
        write_run(folder, phases=3 * number)
        contents.append(read_files(folder)[1])
    assert contents[0].stats["step"] != contents[1].stats["step"]
    return contents


def test_readers_of_a_folder_that_is_saved_all_the_time_get_one_save_or_the_other(saves, tmp_path):
    run, stop = tmp_path / "run", threading.Event()
    write_files(run, saves[0])

    def keep_saving():
        while not stop.is_set():
            for content in saves:
                write_files(run, content)

    steps = {content.stats["step"]: len(content.history) for content in saves}
    thread = threading.Thread(target=keep_saving)
    thread.start()
    try:
        found = {}
        for _ in range(40):
            history = RecyclingHistory.from_pretrained(run)
            found[history.stats["step"]] = len(history.table)
    finally:
        stop.set()
        thread.join()
    assert found == steps


def test_readers_of_a_run_follow_it_to_its_newest_checkpoint(saves, tmp_path):
    """A checkpoint disappears between the moment it is found and the moment it is read."""
    run = tmp_path / "run"
    write_files(run / "checkpoint-1", saves[0])

    def find(folder):
        if (run / "checkpoint-1").is_dir():
            (run / "checkpoint-1").rename(run / "tmp-checkpoint-1-deleted")
            write_files(run / "checkpoint-2", saves[1])
            return run / "checkpoint-1"
        return run / "checkpoint-2"

    folder, content = read_files(run, find)
    assert folder.name == "checkpoint-2"
    assert content.stats["step"] == saves[1].stats["step"]


@pytest.mark.parametrize("name", [files.STATE_FILE, files.HISTORY_FILE, files.STATS_FILE])
def test_files_of_two_saves_are_never_taken_for_one(name, saves, tmp_path):
    """Each is well-formed; and nothing is waited for where nobody saves."""
    for number, content in enumerate(saves):
        write_files(tmp_path / str(number), content)
    shutil.copyfile(tmp_path / "1" / name, tmp_path / "0" / name)
    began = time.monotonic()
    with pytest.raises(RecyclingFileError, match=rf"{name}: it was not saved together with {files.CONFIG_FILE}"):
        RecyclingHistory.from_pretrained(tmp_path / "0")
    assert time.monotonic() - began < 5


def test_a_save_that_was_killed_is_not_waited_for_forever(saves, tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_files(run, saves[0])
    child = os.fork()
    if child == 0:

        def replace(source, target):
            if Path(target) == run / files.STATS_FILE:  # the third of four
                os.kill(os.getpid(), signal.SIGKILL)
            os.rename(source, target)

        file_set.os.replace = replace
        write_files(run, saves[1])
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    monkeypatch.setattr(file_set, "_PATIENCE", 0.2)
    with pytest.raises(RecyclingFileError, match="not saved together"):
        RecyclingHistory.from_pretrained(run)
    remove_half_saved(run)
    assert sorted(path.name for path in run.iterdir()) == sorted(files.RECYCLING_FILES)
    write_files(run, saves[1])
    assert RecyclingHistory.from_pretrained(run).stats["step"] == saves[1].stats["step"]
