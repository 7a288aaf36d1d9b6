"""What a parquet file claims to hold, read without Arrow.

Arrow ends the whole process when some fields of a damaged footer are looked at from Python (ParquetException
from `ColumnChunkMetaData`, pyarrow 26), and looking is what one must do before reading a file of unknown origin.
The footer is one struct in Thrift's compact protocol, which takes a page to parse.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_FOOTER = 16 * 2**20
_MAX_DEPTH = 16


@dataclass(frozen=True)
class ParquetClaims:
    """The claims of a footer: none of them is true before the data has been read."""

    num_rows: int
    row_group_rows: list[int]
    column_values: list[int]
    """Values of each column of each row group, counting those inside lists."""
    column_bytes: list[int]
    """Bytes of each column of each row group once decompressed."""
    metadata: dict[str, str]


def read_footer(path: Path) -> ParquetClaims:
    """Parse the footer of a parquet file.

    Raises:
        ValueError: it is no parquet file, or its footer is damaged.
        OSError: the file can't be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size < 12 or file.read(4) != b"PAR1":
            raise ValueError("no parquet file")
        file.seek(size - 8)
        length, magic = struct.unpack("<I4s", file.read(8))
        if magic != b"PAR1":
            raise ValueError("the end is missing")
        if length > min(size - 12, _MAX_FOOTER):
            raise ValueError(f"a footer of {length:,} bytes")
        file.seek(size - 8 - length)
        data = file.read(length)
    try:
        footer = _Compact(data).struct()
        groups = footer[4]
        chunks = [chunk[3] for group in groups for chunk in group[1]]
        return ParquetClaims(
            num_rows=_whole(footer[3]),
            row_group_rows=[_whole(group[3]) for group in groups],
            column_values=[_whole(chunk[5]) for chunk in chunks],
            column_bytes=[_whole(chunk[6]) for chunk in chunks],
            metadata={
                pair[1].decode("utf-8", "replace"): pair.get(2, b"").decode("utf-8", "replace")
                for pair in footer.get(5, [])
            },
        )
    except (LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError("a damaged footer") from error


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count of {value!r:.40}")
    return value


class _Compact:
    """A reader of Thrift's compact protocol: structs as {field number: value}, lists as lists, text as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("a footer of too many levels")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            # The upper half is the step from the number of the field before; 0 means that a number follows.
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # a bool inside a list, or a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return struct.unpack("<d", self._take(8))[0]
        if kind == 8:
            return self._take(self._unsigned())
        if kind in (9, 10):
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a field of unknown type {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        length = head >> 4 if head >> 4 < 15 else self._unsigned()
        if length > len(self._data) - self._at or depth > _MAX_DEPTH:  # each item takes a byte at least
            raise ValueError("a list that is longer than its footer")
        return [self._value(head & 15, depth + 1) for _ in range(length)]

    def _signed(self) -> int:
        number = self._unsigned()
        return (number >> 1) ^ -(number & 1)

    def _unsigned(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise ValueError("a text that is longer than its footer")
        self._at += length
        return self._data[self._at - length : self._at]
