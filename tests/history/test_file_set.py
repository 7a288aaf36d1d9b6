"""What is read together was saved together, also while it is saved."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from support.simulated_runs import write_run

from hf_recycle import RecyclingHistory
from hf_recycle.records import file_set, files
from hf_recycle.records.file_set import read_files, remove_half_saved, write_files
from hf_recycle.records.files import RecyclingFileError


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Two saves of one run."""
    contents = []
    for number in (1, 2):
        folder = tmp_path_factory.mktemp("source")
        write_run(folder, phases=3 * number)
        contents.append(read_files(folder)[1])
    assert contents[0].stats["step"] != contents[1].stats["step"]
    return contents


@pytest.mark.parametrize("moved", range(5))
@pytest.mark.parametrize("read", ["read_config", "read_state", "read_history", "read_stats"])
def test_a_reader_whom_a_save_overtakes_gets_one_save_or_the_other(read, moved, saves, tmp_path, monkeypatch):
    """The save puts `moved` of its four files into place right before the reader reads one, and the others after it."""
    run = tmp_path / "run"
    write_files(run, saves[0])
    turns, moves = threading.Semaphore(0), threading.Semaphore(0)

    def replace(source, target):
        if Path(target).parent == run:
            turns.acquire()
        os.rename(source, target)
        if Path(target).parent == run:
            moves.release()

    def put_into_place(count):
        for _ in range(count):
            turns.release()
            moves.acquire()

    original = getattr(files, read)

    def overtaken(*args):
        monkeypatch.setattr(files, read, original)  # once
        put_into_place(moved)
        try:
            return original(*args)
        finally:
            put_into_place(4 - moved)
            writer.join()

    monkeypatch.setattr(file_set.os, "replace", replace)
    monkeypatch.setattr(files, read, overtaken)
    writer = threading.Thread(target=write_files, args=(run, saves[1]))
    writer.start()
    history = RecyclingHistory.from_pretrained(run)
    found = history.stats["step"], len(history.table)
    assert found in [(content.stats["step"], len(content.history)) for content in saves]


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
