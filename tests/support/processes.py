"""The processes of a launch, as torchrun starts them, but forked from one that has done the imports: those take longer
than most runs."""

import os
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from support.quick import make_runs_quick


def run_in_processes(engine: str, number: int, main: Callable[[], None]) -> int:
    """Runs `main` in processes that find each other through the environment; returns the exit status.

    When one fails, the others are ended.
    """
    prepare(engine)
    if engine == "single":
        main()
        return 0
    port, told = os.pipe()
    processes = {_fork(rank, number, (port, told), main) for rank in range(number)}
    # The parent holds the store, as torchrun does, so that no other launch takes its port. Its thread starts after the
    # forks.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(told, number * (b"%5d" % store.port))
    failed = False
    while processes:
        ended, status = os.wait()
        processes.discard(ended)
        if status and not failed:
            failed = True
            for process in processes:
                os.kill(process, signal.SIGKILL)
    return int(failed)


def prepare(engine: str) -> None:
    """Imports what the runs need, and spares them what is tested elsewhere."""
    from hf_recycle.plots import run as figures
    from support import tiny_runs  # noqa: F401

    if engine.startswith("zero"):
        import deepspeed  # noqa: F401
    # Process 0 would spend most of its time on the figures of cards.
    figures.figure_images = lambda *_, **__: {}
    make_runs_quick()


def _fork(rank: int, number: int, pipe: tuple[int, int], main: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        port, told = pipe
        os.close(told)  # so that nothing waits for a parent that is gone
        local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        os.environ |= {name: str(value) for name, value in local.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(int(os.read(port, 5)))}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        main()
        if dist.is_initialized():
            # Who leaves first must not cut off what the others still read.
            dist.barrier()
            dist.destroy_process_group()
        status = 0
    except BaseException:
        # Told as an uncaught exception is, with the rank before each line.
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
