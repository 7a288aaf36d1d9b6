"""The footer parser against Arrow's, and on damage that would end the process inside Arrow."""

import struct

import pyarrow.parquet as pq
import pytest
from simulated_runs import write_run

from hf_recycle import files
from hf_recycle.parquet_footer import read_footer


@pytest.fixture
def path(tmp_path):
    write_run(tmp_path)
    return tmp_path / files.HISTORY_FILE


@pytest.mark.parametrize("row_group_size", [None, 5])
def test_it_reads_what_arrow_reads(path, row_group_size):
    pq.write_table(pq.read_table(path), path, row_group_size=row_group_size)
    theirs, mine = pq.read_metadata(path), read_footer(path)
    groups = [theirs.row_group(i) for i in range(theirs.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    assert mine.num_rows == theirs.num_rows
    assert mine.row_group_rows == [group.num_rows for group in groups]
    assert mine.column_values == [column.num_values for column in columns]
    assert mine.column_bytes == [column.total_uncompressed_size for column in columns]
    assert {key.encode(): value.encode() for key, value in mine.metadata.items()} == theirs.metadata


def test_damage_in_the_footer_never_ends_the_process(path):
    whole = path.read_bytes()
    before = files.read_history(path.parent)
    (length,) = struct.unpack("<I", whole[-8:-4])
    for at in range(len(whole) - 8 - length, len(whole), 7):
        for byte in (0, 0x15, 0xFF):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                assert files.read_history(path.parent).equals(before)
            except files.RecyclingFileError as error:
                assert str(path) in str(error)  # noqa: PT017


def footer(content):
    return b"PAR1" + content + struct.pack("<I", len(content)) + b"PAR1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1", "no parquet file"),
        (b"x" * 40, "no parquet file"),
        (b"PAR1" + b"\0" * 20, "the end is missing"),
        (b"PAR1" + struct.pack("<I", 2**31) + b"PAR1", "a footer of 2,147,483,648 bytes"),
        (footer(b"\0"), "damaged footer"),
        (footer(b"\x1c" * 1000), "too many levels"),
        (footer(b"\x19\xfc\xff\xff\xff\xff\x0f"), "longer than its footer"),
        (footer(b"\x18\xff\xff\x03"), "longer than its footer"),
        (footer(b"\x16" + b"\xff" * 20), "more than 64 bits"),
        (footer(b"\x1d"), "unknown type 13"),
        (footer(b"\x36\x01\x19\x0c\0"), "a count of -1"),  # num_rows is -1, there are no row groups
    ],
)
def test_footers_of_nothing(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_footer(tmp_path / "file")
