"""Training on CPUs in little more memory than its tensors need.

A step of BERT Medium with all methods peaks at 1,655 instead of 1,930 MiB with glibc 2.36 (Debian 12), and at
1,517 instead of 1,625 with 2.41, for 4% of the time (docs/profile-step.md, "Memory").
"""

import ctypes
import os
from functools import cache

import torch

_WORTH_IT = 64 * 2**20
"""Bytes. With fewer in holes, small models are not held up."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"]]
    _fields_ += [(name, ctypes.c_size_t) for name in ["fsmblks", "uordblks", "fordblks", "keepcost"]]


def give_back_freed_memory(device: torch.device) -> None:
    """Has glibc give the pages of freed pieces of its heap back to the system; elsewhere, and on accelerators, nothing.

    A forward pass frees many arrays between those that it keeps for the backward pass. glibc leaves these holes
    resident, and before version 2.38 can't even use them for the next aligned array of that size (its bug 14581). When
    all activations are held, before the logits come, is when they weigh most and are needed least.
    """
    if device.type == "cpu" and (libc := _glibc()) and libc.mallinfo2().fordblks >= _WORTH_IT:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return None
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype, libc.malloc_trim.argtypes = _Mallinfo2, [ctypes.c_size_t]  # mallinfo2: since 2.33
    except (AttributeError, OSError, ValueError):
        return None
    return libc
