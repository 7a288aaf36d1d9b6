"""The runner with runs that are a few lines of Python instead of a training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_recycle.studies import runner as module
from hf_recycle.studies.key import run_key
from hf_recycle.studies.lock import run_lock
from hf_recycle.studies.plan import PlannedRun
from hf_recycle.studies.results import RESULT_FILE
from hf_recycle.studies.runner import StudyRunner
from hf_recycle.studies.warm import WarmProcess

SUCCEED = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1]).parent
with open(folder / "ran", "a") as file: file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
log = [{"step": 4, "eval_loss": 2.5}]
(folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": log}))
(folder / "train_results.json").write_text(json.dumps({"train_runtime": 1.0}))
"""
FAIL = "import sys; print('loading'); print('error: no such thing'); sys.exit(2)"
DIE = "import os; print('loading', flush=True); os.kill(os.getpid(), 9)"
WAIT = "import time; print('waiting', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAIT


class Scripted(StudyRunner):
    def __init__(self, folder, scripts, **kwargs):
        self.lines = []
        super().__init__(folder, say=self.lines.append, **{"jobs": 2, **kwargs})
        self.scripts = scripts

    def begin(self, settings, *more):
        script = next(script for arm, script in self.scripts.items() if settings.parent.name.startswith(arm))
        return WarmProcess(os.execv, (sys.executable, [sys.executable, "-S", "-c", script, str(settings)]), *more)

    def _prepare(self, runs):
        pass


def planned(arm, seed=1, **settings):
    settings = {"arm": arm, "seed": seed, **settings}
    return PlannedRun(arm, seed, settings, run_key(settings))


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(tmp_path):
    runs = [planned("bad"), planned("good"), planned("dead"), planned("good", 2), planned("empty")]
    scripts = {"bad": FAIL, "good": SUCCEED, "dead": DIE, "empty": ""}
    results, failures = Scripted(tmp_path, scripts).run(runs)
    assert set(results) == {("good", 1), ("good", 2)}
    assert results["good", 2].eval_loss == 2.5
    assert failures["bad", 1] == "error: no such thing"
    assert failures["dead", 1] == "killed by SIGKILL after saying: loading"
    assert "trainer_state.json" in failures["empty", 1]


def test_finished_runs_are_not_done_again(tmp_path):
    run = planned("good")
    first, _ = Scripted(tmp_path, {"good": SUCCEED}).run([run])
    # Another study gives the same settings another name.
    same = PlannedRun("renamed", 1, run.settings, run.key)
    again = Scripted(tmp_path, {"": FAIL})
    results, failures = again.run([run, same])
    assert not failures
    assert results["good", 1] == first["good", 1]
    assert results["renamed", 1].arm == "renamed"
    assert results["renamed", 1].folder == first["good", 1].folder
    assert any("done before" in line for line in again.lines)
    assert len(list(tmp_path.iterdir())) == 1


def test_two_arms_with_the_same_settings_are_one_run(tmp_path):
    run = planned("good")
    results, _ = Scripted(tmp_path, {"": SUCCEED}).run([run, PlannedRun("twin", 1, run.settings, run.key)])
    assert set(results) == {("good", 1), ("twin", 1)}
    assert Path(results["twin", 1].folder, "ran").read_text() == "-"


def test_a_damaged_result_is_made_anew(tmp_path):
    run = planned("good")
    results, _ = Scripted(tmp_path, {"good": SUCCEED}).run([run])
    folder = Path(results["good", 1].folder)
    (folder / RESULT_FILE).write_text("{")
    again, _ = Scripted(tmp_path, {"good": SUCCEED}).run([run])
    assert again["good", 1].eval_loss == 2.5
    assert (folder / "ran").read_text() == "--"
    assert json.loads((folder / RESULT_FILE).read_text())["steps"] == 4


def test_devices_take_turns(tmp_path):
    runner = Scripted(tmp_path, {"good": SUCCEED}, jobs=1, devices=["7"])
    results, _ = runner.run([planned("good"), planned("good", 2)])
    assert [Path(run.folder, "ran").read_text() for run in results.values()] == ["7", "7"]


def test_settings_that_each_run_gets(tmp_path):
    import yaml

    results, _ = Scripted(tmp_path, {"good": SUCCEED}).run([planned("good", learning_rate=1e-4)])
    folder = Path(results["good", 1].folder)
    settings = yaml.safe_load((folder / module.SETTINGS_FILE).read_text())
    assert settings["learning_rate"] == 1e-4
    assert settings["output_dir"] == str(folder)
    assert settings["resume_from_checkpoint"] == "true"


def interrupt_when(condition):
    def wait():
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("script", [WAIT, STUBBORN], ids=["willing", "stubborn"])
def test_an_interruption_leaves_nothing_running(tmp_path, monkeypatch, script):
    monkeypatch.setattr(module, "_TERMINATION", 0.5)
    runner = Scripted(tmp_path, {"a": script, "b": script, "c": SUCCEED})
    started = {}

    def both_wait():
        started.update({process.pid: process for process in runner._processes})
        return len([log for log in tmp_path.glob("*/study.log") if "waiting" in log.read_text()]) == 2

    interrupt_when(both_wait)
    with pytest.raises(KeyboardInterrupt):
        runner.run([planned("a"), planned("b"), planned("c"), planned("c", 2)])
    assert len(started) == 2
    assert not any(map(alive, started))
    # What had not begun does not begin, and nothing is called failed.
    assert not list(tmp_path.glob("c*/ran"))
    assert not any("FAILED" in line for line in runner.lines)
    results, failures = Scripted(tmp_path, {"": SUCCEED}).run([planned("a"), planned("c")])
    assert set(results) == {("a", 1), ("c", 1)}
    assert not failures


def test_nothing_starts_after_a_stop(tmp_path):
    runner = Scripted(tmp_path, {"good": SUCCEED})
    runner._stop()
    results, _ = runner.run([planned("good")])
    assert not results
    assert not list(tmp_path.glob("*/ran"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed in /proc")
def test_a_run_holds_the_lock_itself(tmp_path):
    held = """
links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
(folder / "held").write_text(str(any(link.endswith(".study.lock") for link in links)))
"""
    results, _ = Scripted(tmp_path, {"good": SUCCEED + held}).run([planned("good")])
    assert Path(results["good", 1].folder, "held").read_text() == "True"


def test_two_studies_do_not_do_one_run_at_once(tmp_path):
    run = planned("good")
    folder = tmp_path / run.folder
    folder.mkdir()
    # A training process that outlived its study holds the lock that it inherited.
    with run_lock(folder, threading.Event(), lambda: None) as lock:
        orphan = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    runner = Scripted(tmp_path, {"good": SUCCEED}, jobs=1)
    thread = threading.Thread(target=lambda: outcome.append(runner.run([run])))
    outcome = []
    thread.start()
    try:
        while not runner.lines:
            time.sleep(0.02)
        assert "waiting, another process is at it" in runner.lines[0]
        time.sleep(0.2)
        assert not (folder / "ran").exists()
    finally:
        orphan.communicate(b"\n")
    thread.join()
    assert ("good", 1) in outcome[0][0]
