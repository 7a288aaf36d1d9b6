"""`hf-recycle train ... --accelerate_config NAME`: the same training, started on several processes.

This process becomes `accelerate launch --config_file ... -m hf_recycle.train ...`: a signal sent to it reaches every
process of the run, and its exit status is theirs.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser, completed_by
from hf_recycle.utils.recipe_files import recipe_root
from hf_recycle.utils.suggest import nearest

LAUNCH_OPTIONS = {
    "accelerate_config": "ddp, fsdp2, zero2 or zero3, or the path of a file that `accelerate config` wrote.",
    "num_processes": "Processes on all machines together (default: one for each visible device).",
    "num_machines": "Machines; start the same command on each (default: 1).",
    "machine_rank": "Number of this machine, from 0 (default: 0).",
    "main_process_ip": "Address of machine 0.",
    "main_process_port": "Port of machine 0 (default: a free one, with several machines 29500).",
}
# The words of this launch, for the sentence that tells how to go on.
LAUNCH_WORDS = "HF_RECYCLE_LAUNCH_WORDS"
_SUFFIXES = (".yaml", ".yml", ".json")
_LEAST = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}


def add_launch_arguments(parser: Parser) -> None:
    """Adds the launch options; a namespace holds those alone that are given."""
    group = parser.add_argument_group("several processes")
    for name, text in LAUNCH_OPTIONS.items():
        kind = int if name in _LEAST else str
        action = group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
        if name == "accelerate_config":
            completed_by(action, lambda prefix: accelerate_configs())


def launch_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of a command's options that say how to launch it.

    Raises:
        UserError: launch options without accelerate_config.
    """
    given = {name: value for name, value in vars(options).items() if name in LAUNCH_OPTIONS}
    if given and "accelerate_config" not in given:
        first = next(iter(given))
        raise UserError(f"--{first} goes with --accelerate_config: name one of {', '.join(accelerate_configs())}")
    return given


def accelerate_configs() -> list[str]:
    """Short names of the packaged accelerate configurations."""
    return sorted(path.stem for path in (recipe_root() / "accelerate").glob("*.yaml"))


def find_accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration, given its path or its short name.

    Raises:
        UserError: there is none; the message names the nearest one and all of them.
    """
    path = Path(name).expanduser()
    if path.suffix in _SUFFIXES and path.is_file():
        return path
    names = accelerate_configs()
    if name in names:
        return recipe_root() / "accelerate" / f"{name}.yaml"
    missing = f"accelerate_config={name!r} is neither a file that ends in .yaml nor the name of a packaged one"
    raise UserError(f"{missing}; {nearest(name, names, show_all=True)}")


def launch(options: Mapping[str, Any], words: Sequence[str]) -> int:
    """Train on several processes; returns the exit status of the one that failed first, or 0.

    Args:
        options: launch options, among them accelerate_config.
        words: the command line without them.

    Raises:
        UserError: a configuration that can't be read or starts one process only, or a number that is too small.
    """
    if "LOCAL_RANK" in os.environ:
        raise UserError("--accelerate_config starts the processes itself; leave it out under accelerate launch")
    file = find_accelerate_config(options["accelerate_config"])
    configured = _read(file)
    for name, least in _LEAST.items():
        if options.get(name, least) < least:
            raise UserError(f"{name}={options[name]} must be at least {least}")
    machines = options.get("num_machines", configured.num_machines)
    processes = options.get("num_processes", max(configured.num_processes, 0) or _devices() * machines)
    if processes < 1:
        raise UserError("no device is visible: say how many processes to start with --num_processes")
    passed = dict(options) | {"num_processes": processes}
    if machines == 1:
        # Accelerate's own default, 29500, is taken as soon as two runs share a machine.
        passed.setdefault("main_process_port", 0)
    del passed["accelerate_config"]
    from hf_recycle.engines.launch import EXPECTED_PROCESSES  # late, because it brings torch

    os.environ[EXPECTED_PROCESSES] = str(processes)
    os.environ[LAUNCH_WORDS] = shlex.join(_words(options))
    return _accelerate_launch(["--config_file", str(file), *_words(passed), "-m", "hf_recycle.train", *words])


def _words(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _accelerate_launch(command: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It reports every end of a process at length; what there is to say, the processes and we say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status not in (2, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            print(f"error: process {rank} was ended {how}; the others were stopped", file=sys.stderr)
        return status if status > 0 else 128 - status
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _read(file: Path):
    """The configuration as Accelerate reads it."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        configured = load_config_from_file(str(file))
    except Exception as error:  # whatever a file can hold
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"accelerate_config={str(file)!r} could not be read: {reason}") from error
    kind = configured.distributed_type.value
    if kind in ("NO", "MULTI_CPU"):
        raise UserError(
            f"accelerate_config={str(file)!r} has distributed_type={kind}, with which accelerate launch starts one "
            "process only; use ddp (distributed_type MULTI_GPU), on CPUs together with --use_cpu"
        )
    return configured


def _devices() -> int:
    import torch

    return torch.accelerator.device_count()
