"""One training at a time works in a folder, and the lock on it ends with its process."""

import os
import signal
import time

import pytest
from support.tiny_runs import sentences, tiny_bert
from transformers import DataCollatorForLanguageModeling

from hf_recycle import RecyclingTrainer
from hf_recycle.checkpoints.claims import LOCK_FILE
from hf_recycle.errors import UserError
from hf_recycle.utils.locks import FileLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="files are locked on POSIX only")


def test_a_lock_dies_with_its_process_though_its_workers_live_on(tmp_path):
    lock, (held, tell) = FileLock(tmp_path / "run" / "lock"), os.pipe()
    training = os.fork()
    if training == 0:
        lock.take()
        worker = os.fork()  # as a data loader's
        if worker:
            os.write(tell, b"%9d" % worker)
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(held, 9))
    try:
        assert not lock.take()
        assert lock.holder().startswith(f"process {training} on ")
        os.kill(training, signal.SIGKILL)
        os.waitpid(training, 0)
        os.kill(worker, 0)
        assert lock.take()
        assert lock.holder().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(worker, signal.SIGKILL)
    lock.release()
    assert not lock.path.exists()
    assert FileLock(lock.path).take()


def test_who_opened_the_file_before_it_was_removed_takes_the_next_one(tmp_path, monkeypatch):
    import hf_recycle.utils.locks as module

    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    assert first.take()
    flock = module.fcntl.flock

    def released_just_now(*arguments):
        monkeypatch.setattr(module.fcntl, "flock", flock)
        first.release()
        flock(*arguments)

    monkeypatch.setattr(module.fcntl, "flock", released_just_now)
    assert second.take()
    assert not third.take()


def test_where_nothing_can_be_locked_it_is_as_if_nobody_were_there(tmp_path, monkeypatch):
    import hf_recycle.utils.locks as module

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    assert FileLock(tmp_path / "lock").take()
    assert FileLock(tmp_path / "lock").take()
    (tmp_path / "file").write_text("")
    assert FileLock(tmp_path / "file" / "lock").take()


@pytest.mark.slow
def test_the_trials_of_a_search_have_folders_of_their_own(arguments, tokenizer, tmp_path):
    pytest.importorskip("optuna")
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1, recycle_steps=1)
    held = FileLock(tmp_path / "run" / "run-0" / LOCK_FILE)
    trainer = RecyclingTrainer(
        model_init=lambda: tiny_bert(),
        args=args,
        train_dataset=sentences(),
        eval_dataset=sentences(8, seed=9),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}, n_trials=2, backend="optuna"
    )
    assert sorted(path.parent.name for path in (tmp_path / "run").glob("*/checkpoint-2")) == ["run-0", "run-1"]
    assert held.take()


@pytest.mark.parametrize("resume", [pytest.param(None, marks=pytest.mark.slow), True])
def test_a_second_training_in_a_folder_is_refused(resume, train, tmp_path):
    train(max_steps=2, save_strategy="steps", save_steps=1)
    other = FileLock(tmp_path / "run" / LOCK_FILE)
    assert other.take()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(
        UserError, match=rf"output_dir='.*run' is in use by another training \(process {os.getpid()} on"
    ):
        train(max_steps=4, save_strategy="steps", save_steps=1, resume=resume)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    other.release()
    assert train(max_steps=3, save_strategy="steps", save_steps=1, resume=resume).state.global_step == 3
    # One that has ended, or failed, holds nothing.
    assert other.take()
