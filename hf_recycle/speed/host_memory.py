"""Training on CPUs in little more memory than its tensors need."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

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


@contextmanager
def sparse_tied_gradient(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the gradient of input embeddings that an output layer is tied to is added to that layer's row
    by row; else two more arrays of their size are made at the end of the backward pass.

    Only where every backward pass goes through the output layer is the sum a dense gradient.
    """
    embeddings = model.get_input_embeddings()
    output = model.get_output_embeddings()
    if (
        type(embeddings) is not nn.Embedding
        or output is None
        or output.weight is not embeddings.weight
        or embeddings.sparse
        or embeddings.scale_grad_by_freq
    ):
        yield
        return
    embeddings.sparse = True
    try:
        yield
    finally:
        embeddings.sparse = False
