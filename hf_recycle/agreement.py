"""A cheap check that all processes did the same."""

import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def checksum(tensors: Iterable[Tensor]) -> int:
    """A checksum of the bytes of some tensors."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), value)
    return value


def check_agreement(value: int, what: str, device: torch.device) -> None:
    """Compares `value` across processes; with one process it does nothing.

    Args:
        what: what the value is a checksum of, for the message.
        device: a device that the process group can send from.

    Raises:
        RuntimeError: on every process, if they differ.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = torch.tensor([value], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    values = [int(other) for other in everyone]
    if len(set(values)) > 1:
        raise RuntimeError(
            f"The processes disagree about {what} (checksums {values}): their weights, seeds or settings differ, and "
            "training on would make models that drift apart. Start all processes with the same recipe and checkpoint."
        )
