"""The most memory a process held."""

from __future__ import annotations

import torch


class Memory:
    """Peak memory above what the process held when this was made.

    On CUDA the bytes of tensors that torch allocated; else the resident memory of the process, where the system tells
    (Linux).
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._idle = 0 if self._cuda else status("VmRSS")

    def restart(self) -> None:
        """Forgets peaks so far."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:  # not allowed here: the peak since the process began, which a first step has shaped
            pass

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        peak = status("VmHWM")
        return None if peak is None or self._idle is None else peak - self._idle


def status(name: str) -> int | None:
    """A line of `/proc/self/status` in bytes."""
    try:
        with open("/proc/self/status") as file:
            found = next((line for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None
    return None if found is None else 1024 * int(found.split()[1])
