"""Does the runs of a study: each in its own process, several at a time, resumable, each once."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from hf_recycle.studies.plan import PlannedRun
from hf_recycle.studies.results import RunResult, collect, load_result

SETTINGS_FILE, LOG_FILE = "study_settings.yaml", "study.log"
_TERMINATION = 60  # seconds that an interrupted run has to stop


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
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._devices: queue.Queue[str | None] = queue.Queue()
        for number in range(jobs):
            self._devices.put(devices[number % len(devices)] if devices else None)

    def run(self, planned: Sequence[PlannedRun]) -> tuple[dict, dict]:
        """Does the runs; a failed one does not stop the others.

        Returns:
            `{(arm, seed): RunResult}` and `{(arm, seed): the last words of a failed run}`.

        Raises:
            KeyboardInterrupt: after the running runs have stopped; the same study goes on where it was.
        """
        results: dict[tuple[str, int], RunResult] = {}
        failures: dict[tuple[str, int], str] = {}
        first = {}
        for run in planned:
            first.setdefault(run.key, run)
        self._prepare(list(first.values()))
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {key: pool.submit(self._do, run) for key, run in first.items()}
            try:
                for run in planned:
                    outcome = futures[run.key].result()
                    if isinstance(outcome, str):
                        failures[run.arm, run.seed] = outcome
                    else:
                        results[run.arm, run.seed] = load_result(run, Path(outcome.folder))
            except KeyboardInterrupt:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return results, failures

    def folder_of(self, run: PlannedRun) -> Path:
        """Where a run lies: under the name that the first study to do it gave it."""
        found = sorted(self.folder.glob(f"*-{run.key}"))
        return found[0] if found else self.folder / run.folder

    def _prepare(self, runs: Sequence[PlannedRun]) -> None:
        """Tokenises data that several runs share once, before they start together."""
        unfinished = [run for run in runs if load_result(run, self.folder_of(run)) is None]
        if self.jobs < 2 or len(unfinished) < 2:
            return
        settings = self._write_settings(unfinished[0])
        subprocess.run(
            [sys.executable, "-m", "hf_recycle.studies.prepare", str(settings)], capture_output=True, check=False
        )

    def _do(self, run: PlannedRun) -> RunResult | str:
        folder = self.folder_of(run)
        done = load_result(run, folder)
        if done is not None:
            self._say(f"{run.arm}, seed {run.seed}: done before, evaluation loss {done.eval_loss:.4f}")
            return done
        if self._stopping.is_set():
            return "interrupted"
        settings = self._write_settings(run)
        device = self._devices.get()
        try:
            self._say(f"{run.arm}, seed {run.seed}: started, log in {folder / LOG_FILE}")
            status = self._launch(settings, folder / LOG_FILE, device)
        finally:
            self._devices.put(device)
        if self._stopping.is_set():
            return "interrupted"
        if status == 0:
            try:
                result = collect(run, folder)
            except Exception as error:  # whatever a run left behind, the other runs go on
                return self._failed(run, f"its results can't be read: {error}")
            self._say(f"{run.arm}, seed {run.seed}: evaluation loss {result.eval_loss:.4f} in {result.seconds:.0f} s")
            return result
        return self._failed(run, _last_words(folder / LOG_FILE) or f"it ended with status {status}")

    def _failed(self, run: PlannedRun, words: str) -> str:
        self._say(f"{run.arm}, seed {run.seed}: FAILED: {words}")
        return words

    def _write_settings(self, run: PlannedRun) -> Path:
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        values = dict(run.settings) | {"output_dir": str(folder), "resume_from_checkpoint": "true"}
        values.setdefault("disable_tqdm", True)
        path = folder / SETTINGS_FILE
        path.write_text(yaml.safe_dump(values, sort_keys=True))
        return path

    def _launch(self, settings: Path, log: Path, device: str | None) -> int:
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | os.environ
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "hf_recycle.train", str(settings)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C goes to this process alone, which passes it on in an orderly way.
                start_new_session=True,
            )
            with self._lock:
                self._processes.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._processes.discard(process)

    def _stop(self) -> None:
        self._stopping.set()
        with self._lock:
            running = list(self._processes)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(_TERMINATION)
            except subprocess.TimeoutExpired:
                process.kill()


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
