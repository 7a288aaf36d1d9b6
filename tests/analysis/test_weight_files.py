import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_recycle.analysis.weight_files import SafetensorsFile, read_pickled
from hf_recycle.errors import UserError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0)}, path)
    return path


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=2), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_rows_are_those_of_the_tensors_that_were_saved(folder, shapes, dtype, data):
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "pytorch_model.bin")

    for file in (SafetensorsFile(folder / "model.safetensors"), read_pickled(folder / "pytorch_model.bin")):
        assert set(file.entries) == set(tensors)
        for name, tensor in tensors.items():
            # As matrices: those of experts lie one behind the other.
            columns = data.draw(st.sampled_from([tensor[0].numel(), tensor.shape[-1]]))
            matrix = tensor.reshape(-1, columns)
            start = data.draw(st.integers(0, len(matrix) - 1))
            stop = data.draw(st.integers(start + 1, len(matrix)))
            rows = file.rows(name, start, stop, columns)
            assert file.shape(name) == tuple(tensor.shape)
            assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(rows, matrix[start:stop].to(rows.dtype))


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_a_file_cut_short_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        SafetensorsFile(path)


def rewrite(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[3, 5]),
        lambda header: header["a"].update(shape=[-3, -4]),
        lambda header: header["a"].update(data_offsets=[0, 10**12]),
        lambda header: header["b"].update(data_offsets=[0, 20]),
        lambda header: header["b"].pop("dtype"),
        lambda header: header.update(c=3),
        lambda header: header.pop("b"),
        lambda header: header["a"].update(data_offsets=["0", "48"]),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(path, change):
    rewrite(path, change)
    with pytest.raises(UserError, match="is damaged"):
        SafetensorsFile(path)


def test_rubbish_is_refused(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\n")
    with pytest.raises(UserError, match="is damaged"):
        SafetensorsFile(path)


def test_quantised_tensors_are_refused_by_name(tmp_path):
    save_file({"w": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="w is stored as I8"):
        SafetensorsFile(tmp_path / "model.safetensors").rows("w", 0, 1, 2)


def test_the_pickled_format_of_before_2020(tmp_path):
    tensors = {"w": torch.arange(6.0).view(2, 3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickled(tmp_path / "pytorch_model.bin").rows("w", 0, 2, 3), tensors["w"])


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_pickle_is_executed(tmp_path, capsys):
    torch.save({"w": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't be read as plain weights"):
        read_pickled(tmp_path / "pytorch_model.bin")
    assert "executed" not in capsys.readouterr().out
