"""Does the runs of a study: each in its own process, several at a time, resumable, each once."""

import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import yaml

from hf_recycle.studies.lock import run_lock
from hf_recycle.studies.plan import PlannedRun
from hf_recycle.studies.results import RunResult, collect, load_result
from hf_recycle.studies.warm import WarmProcess

SETTINGS_FILE, LOG_FILE = "study_settings.yaml", "study.log"
_TERMINATION = 60  # seconds that interrupted runs have to stop

Results = dict[tuple[str, int], RunResult]
Failures = dict[tuple[str, int], str]


class StudyRunner:
    """Runs what is not done yet.

    Args:
        folder: where runs are kept; runs with equal settings are shared by all studies that use it.
        jobs: runs at a time.
        devices: values of CUDA_VISIBLE_DEVICES to hand out, one to each running run; empty: none are handed out.
        say: takes a line of progress.
    """

    def __init__(self, folder: Path, jobs: int, devices: Sequence[str] = (), say: Callable[[str], None] = print):
        self.folder = folder
        self.jobs = jobs
        self._say = say
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self._processes: set[WarmProcess] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._devices: queue.Queue[str | None] = queue.Queue()
        for number in range(jobs):
            self._devices.put(devices[number % len(devices)] if devices else None)

    def run(self, planned: Sequence[PlannedRun]) -> tuple[Results, Failures]:
        """Does the runs; a failed one does not stop the others.

        Returns:
            `{(arm, seed): RunResult}` and `{(arm, seed): the last words of a failed run}`.

        Raises:
            KeyboardInterrupt: after the running runs have stopped; the same study goes on where it was.
        """
        results: Results = {}
        failures: Failures = {}
        first: dict[str, PlannedRun] = {}
        for run in planned:
            first.setdefault(run.key, run)
        unfinished = [run for run in first.values() if load_result(run, self.folder_of(run)) is None]
        self._to_do, self._done, self._began = len(unfinished), 0, time.monotonic()
        self._prepare(unfinished)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = {key: pool.submit(self._do, run) for key, run in first.items()}
                for run in planned:
                    outcome = futures[run.key].result()
                    if isinstance(outcome, str):
                        failures[run.arm, run.seed] = outcome
                    else:
                        results[run.arm, run.seed] = replace(outcome, arm=run.arm, seed=run.seed)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        return results, failures

    def folder_of(self, run: PlannedRun) -> Path:
        """Where a run lies: under the name that the first study to do it gave it."""
        found = sorted(self.folder.glob(f"*-{run.key}"))
        return found[0] if found else self.folder / run.folder

    def begin(self, settings: Path, log: Path, environment: Mapping[str, str], lock: int | None) -> WarmProcess:
        """Starts the run of a settings file."""
        return WarmProcess(_train, (str(settings), self.threads), log, environment, lock)

    def _prepare(self, runs: Sequence[PlannedRun]) -> None:
        """Tokenises data that several runs share once, before they start together."""
        if self.jobs < 2 or len(runs) < 2:
            return
        settings = self._write_settings(runs[0])
        # What is wrong with the data, the runs will say.
        subprocess.run(
            [sys.executable, "-m", "hf_recycle.studies.prepare", str(settings)], capture_output=True, check=False
        )

    def _do(self, run: PlannedRun) -> RunResult | str:
        try:
            outcome = self._run(run)
        except Exception as error:  # a full disk, files that can't be read: the other runs go on
            outcome = f"{type(error).__name__}: {error}"
        if isinstance(outcome, str):
            self._say(
                f"{run.arm}, seed {run.seed}: " + ("stopped" if self._stopping.is_set() else f"FAILED: {outcome}")
            )
        return outcome

    def _run(self, run: PlannedRun) -> RunResult | str:
        folder, name = self.folder_of(run), f"{run.arm}, seed {run.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"{name}: waiting, another process is at it in {folder}"
        with run_lock(folder, self._stopping, lambda: self._say(busy)) as lock:
            done = load_result(run, folder)
            if done is not None:
                self._say(f"{name}: done before, evaluation loss {done.eval_loss:.4f}")
                return done
            settings, log = self._write_settings(run), folder / LOG_FILE
            goes_on = any(folder.glob("checkpoint-*"))
            device = self._devices.get()
            try:
                self._say(f"{name}: {'goes on' if goes_on else 'started'}, log in {log}")
                status = self._launch(settings, log, device, lock)
            finally:
                self._devices.put(device)
            if status != 0:
                return _last_words(log, status)
            result = collect(run, folder)
        self._say(f"{name}: evaluation loss {result.eval_loss:.4f}; {self._progress()}")
        return result

    def _progress(self) -> str:
        """How many runs are done of those that were to do, and about how long the others take at that pace."""
        with self._lock:
            self._done += 1
            left = self._to_do - self._done
            minutes = (time.monotonic() - self._began) / self._done * left / 60
        return f"{self._done} of {self._to_do} done" + (f", about {minutes:.0f} minutes left" if left else "")

    def _write_settings(self, run: PlannedRun) -> Path:
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"disable_tqdm": True, "include_num_input_tokens_seen": True, **run.settings}
        values |= {"output_dir": str(folder), "resume_from_checkpoint": "true"}
        path = folder / SETTINGS_FILE
        path.write_text(yaml.safe_dump(values, sort_keys=True), encoding="utf-8")
        return path

    def _launch(self, settings: Path, log: Path, device: str | None, lock: int | None) -> int:
        environment = {"TOKENIZERS_PARALLELISM": "false"} | os.environ
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with self._lock:
            # Asked under the lock: what starts after `_stop` has looked would be left running.
            if self._stopping.is_set():
                return -signal.SIGTERM
            process = self.begin(settings, log, environment, lock)
            self._processes.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._processes.discard(process)

    def _stop(self) -> None:
        """Ends the running runs; a second interrupt ends them at once."""
        with self._lock:
            self._stopping.set()
            running = list(self._processes)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _TERMINATION
        try:
            for process in running:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()


def _train(settings: str, threads: int) -> int:
    """Does what `python -m hf_recycle.train SETTINGS` does, and ends this process as that does."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    sys.argv[1:] = [settings]
    runpy.run_module("hf_recycle.train", run_name="__main__")
    raise AssertionError("it ends the process")


def _last_words(log: Path, status: int) -> str:
    """How a failed run ended: its last line, and the signal if one killed it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else ""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + (f" after saying: {said}" if said else "")
    return said or f"it ended with status {status}"
