"""One process decides for all, and a cheap check that all did the same."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_recycle.errors import UserError

Result = TypeVar("Result")


class ReplicaChecksum:
    """Whether all processes did the same, by a checksum of what each notes; with one process it costs nothing."""

    def __init__(self) -> None:
        self._several, self._checksum = process_count() > 1, 0

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Adds the bytes of some tensors to the checksum."""
        for tensor in tensors if self._several else ():
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            self._checksum = zlib.crc32(data, self._checksum)

    def check(self, what: str, device: torch.device) -> None:
        """Compares the checksums.

        Args:
            what: what was noted, for the message.
            device: a device that the process group can send from.

        Raises:
            RuntimeError: on every process, if they differ.
        """
        if not self._several:
            return
        mine = torch.tensor([self._checksum], dtype=torch.int64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(process_count())]
        dist.all_gather(everyone, mine)
        values = [int(other) for other in everyone]
        if len(set(values)) > 1:
            raise RuntimeError(
                f"The processes disagree about {what} (checksums {values}): their weights, seeds or settings differ, "
                "and training on would make models that drift apart. Start all processes with the same recipe and "
                "checkpoint."
            )


def compare_replicas(tensors: Iterable[Tensor], what: str, device: torch.device) -> None:
    """Compares tensors across processes, see `ReplicaChecksum`."""
    checksum = ReplicaChecksum()
    checksum.note(tensors)
    checksum.check(what, device)


def true_everywhere(flag: Tensor) -> bool:
    """Whether `flag`, a bool of one item on a device that the process group can send from, is true on every process."""
    flag = flag.reshape(1).to(torch.int32)
    if process_count() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def from_main_process(make: Callable[[], Result], device: torch.device) -> Result:
    """What `make` gives on process 0, on every process.

    Args:
        make: called on process 0 alone.
        device: a device that the process group can send from.

    Raises:
        UserError: on every process, if `make` does.
    """
    if process_count() == 1:
        return make()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [make()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, device=device)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def on_every_process(check: Callable[[], None], *, here: bool = True) -> None:
    """Runs `check` on the processes where `here` is true; what one of them refuses is raised on all.

    Raises:
        UserError: on every process, if `check` does on any.
    """
    refused = None
    if here:
        try:
            check()
        except UserError as error:
            refused = error
    if process_count() > 1:
        everyone: list[UserError | None] = [None] * process_count()
        dist.all_gather_object(everyone, refused)
        refused = next(filter(None, everyone), None)
    if refused is not None:
        raise refused


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
