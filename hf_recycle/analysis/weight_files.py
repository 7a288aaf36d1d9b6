"""Files of weights, read a few rows at a time.

Plain reads and no memory map: pages of a mapped file count as memory of the process, and a limit on its address space
would forbid mapping a file larger than it.
"""

import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_recycle.errors import UserError, reason_of

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # what the safetensors format allows


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the file spells it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file.

    Raises:
        UserError: the file is damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_header(path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def rows(self, name: str, start: int, stop: int, columns: int) -> Tensor:
        """Rows `start` to `stop` of a tensor as a matrix of so many columns, float32 (float64 if it is that).

        Raises:
            UserError: the tensor's dtype is no floating-point one that weights are trained in.
        """
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: {name} is stored as {entry.dtype}, not as {', '.join(_DTYPES)}: quantised weights have "
                "no magnitudes to measure; use the checkpoint they were made from"
            )
        dtype = _DTYPES[entry.dtype]
        line = columns * dtype.itemsize
        data = bytearray((stop - start) * line)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.begin + start * line)
            _read_into(file, data, self.path)
        values = torch.frombuffer(data, dtype=dtype).view(stop - start, columns)
        return values.to(torch.promote_types(dtype, torch.float32))


@dataclass(frozen=True)
class Tensors:
    """Tensors in memory, or mapped into it, that came from a file or several in the folder `path`."""

    path: Path
    entries: Mapping[str, Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name].shape)

    def rows(self, name: str, start: int, stop: int, columns: int) -> Tensor:
        values = self.entries[name].detach().reshape(-1, columns)[start:stop]
        return values.to(torch.promote_types(values.dtype, torch.float32))


def read_pickled(path: Path) -> Tensors:
    """A `pytorch_model.bin`, read as transformers reads it: by torch's unpickler for weights, which refuses everything
    else (`weights_only`). Memory-mapped, but for the format of before 2020.

    Raises:
        UserError: it can't be read so.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return Tensors(path, {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
    except Exception as error:  # the unpickler and the archive reader have many
        raise UserError(
            f"{path} can't be read as plain weights ({reason_of(error)}); load the model with transformers and "
            "save it with save_pretrained, which writes safetensors"
        ) from error


WeightFile = SafetensorsFile | Tensors


def _read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, checked to lie within it, each where the one before it ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            _damaged(path, "its header is missing or longer than the file")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(fields, 8 + length) for name, fields in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _damaged(path, f"its header can't be read: {reason_of(error)}")
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        itemsize = _DTYPES[entry.dtype].itemsize if entry.dtype in _DTYPES else None
        expected = None if itemsize is None else math.prod(entry.shape) * itemsize
        if entry.begin != end or entry.end < entry.begin or expected not in (None, entry.end - entry.begin):
            _damaged(path, f"the place of {name} contradicts its shape or its neighbours")
        end = entry.end
    if end != size:
        _damaged(path, f"its header describes {end:,} bytes and it has {size:,}")
    return entries


def _entry(fields: Mapping[str, Any], offset: int) -> Entry:
    shape, (begin, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a size or an offset is not a whole number from 0")
    return Entry(str(fields["dtype"]), shape, offset + begin, offset + end)


def _read_into(file: Any, data: bytearray, path: Path) -> None:
    view, done = memoryview(data), 0
    while done < len(view):  # a single read may give less than it was asked for
        count = file.readinto(view[done:])
        if not count:
            _damaged(path, "it ended while it was read")
        done += count


def _damaged(path: Path, problem: str) -> NoReturn:
    raise UserError(f"{path} is damaged ({problem}); copy or download it again")
