"""Whether the processes that were asked for are there, and were started alike."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from hf_recycle.engines.replica_checksum import process_count
from hf_recycle.errors import UserError

EXPECTED_PROCESSES = "HF_RECYCLE_NUM_PROCESSES"
# What launchers tell the processes they start: our own, torchrun (and accelerate launch through it), mpirun.
_COUNTS = (EXPECTED_PROCESSES, "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_process_count(found: int) -> None:
    """Refuses to train alone where a launcher was asked for several processes.

    Args:
        found: processes that train together.

    Raises:
        UserError: there are fewer than the environment speaks of.
    """
    expected = max(int(os.environ.get(name) or 1) for name in _COUNTS)
    if found < expected:
        raise UserError(
            f"{expected} processes were asked for, but {_alone(found)}: on CPUs add --use_cpu (use_cpu=True); on GPUs "
            "check that PyTorch sees them"
        )
    if found == 1 and _started_one_of_several():
        raise UserError(
            "several processes were asked for, but accelerate launch started a single one, as it does with --cpu and "
            "with distributed_type MULTI_CPU: use hf-recycle train ... --accelerate_config ddp --num_processes N "
            "--use_cpu, or torchrun (or, for one process, unset MASTER_ADDR)"
        )


def _alone(found: int) -> str:
    return "each would train alone" if found == 1 else f"only {found} train together"


def _started_one_of_several() -> bool:
    # Accelerate's launcher of single processes sets the first always, the second when it was asked for more than one; a
    # process that belongs to several has a rank.
    environment = os.environ
    return "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "RANK" not in environment


def check_same(values: Mapping[str, Any]) -> None:
    """Compares values by name across processes; with one process it does nothing.

    One exchange of all of them, so that no process waits for another that has already stopped.

    Raises:
        UserError: on every process, naming the first that differs.
    """
    if process_count() == 1:
        return
    mine = {name: json.dumps(value, sort_keys=True, default=_named) for name, value in values.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(process_count())]
    dist.all_gather_object(everyone, mine)
    for name in dict.fromkeys(name for process in everyone for name in process):
        found = [process.get(name, "nothing") for process in everyone]
        other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            raise UserError(
                f"the processes disagree about {name}: process 0 has {_short(found[0])}, process {other} has "
                f"{_short(found[other])}; start all of them with the same recipe, arguments, data and checkpoint"
            )


def _named(value: Any) -> Any:
    """What stands for a value that JSON doesn't know; never its address, which differs between processes."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return type(value).__name__


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# Of one process, or of what it says while it trains.
_MAY_DIFFER = {"local_rank", "disable_tqdm", "hub_token", "log_level", "log_level_replica", "report_to", "run_name"}


def shared_arguments(args) -> dict[str, Any]:
    """The `TrainingArguments` that all processes of a training must share."""
    # Folders of the same name on machines that share none.
    skipped = _MAY_DIFFER | ({"output_dir", "resume_from_checkpoint"} if args.save_on_each_node else set())
    return {name: value for name, value in args.to_dict().items() if name not in skipped}
