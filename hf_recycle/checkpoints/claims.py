"""A run's folder belongs to one training at a time, and every process of it finds what another has saved."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from transformers import TrainingArguments

from hf_recycle.checkpoints.run_folder import tidy
from hf_recycle.engines.replica_checksum import on_every_process
from hf_recycle.errors import UserError
from hf_recycle.utils.locks import FileLock

LOCK_FILE = ".training.lock"
_PATIENCE = 10.0  # seconds until a file is seen on all machines of a network file system


@contextmanager
def claimed(folder: Path, args: TrainingArguments) -> Iterator[None]:
    """Within it this training alone works in `folder`, in which nothing is left of one that was killed.

    The processes that save hold a lock, which ends with them.

    Raises:
        UserError: on every process, if another training has the folder, or machines don't share it that must (or do
            and must not).
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        on_every_process(lambda: _take(lock, folder, args), here=args.should_save)
        if args.world_size > 1:
            _check_machines(lock, folder, args)
        yield
    finally:
        lock.release()


def _take(lock: FileLock, folder: Path, args: TrainingArguments) -> None:
    if not lock.take():
        remedy = "wait until it ends, or name another folder"
        if args.save_on_each_node:
            remedy += "; where machines share output_dir, leave save_on_each_node out"
        raise UserError(f"output_dir={str(folder)!r} is in use by another training ({lock.holder()}): {remedy}")
    tidy(folder)


def _check_machines(lock: FileLock, folder: Path, args: TrainingArguments) -> None:
    """What process 0 has written is seen by all, unless each machine saves for itself."""
    mine = lock.holder() if args.should_save else ""
    everyone = [""] * args.world_size
    dist.all_gather_object(everyone, mine)
    expected = {mine} if args.should_save else set(filter(None, everyone))

    def check() -> None:
        deadline = time.monotonic() + _PATIENCE
        while expected and lock.holder() not in expected:
            if time.monotonic() > deadline:
                raise UserError(
                    f"save_on_each_node=True and the machines share output_dir={str(folder)!r}: leave it out"
                    if args.should_save
                    else f"output_dir={str(folder)!r} is not shared by all machines, so they could not resume from "
                    "what the first one saves: name a folder that they share, or pass --save_on_each_node true"
                )
            time.sleep(0.1)

    on_every_process(check)
