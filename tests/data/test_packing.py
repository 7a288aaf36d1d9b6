import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recycle.data.packing import Frame, pack, truncate

FRAMES = [Frame(101, 102, 102), Frame(None, None, 50256), Frame(None, None, None), Frame(101, None, 7)]


def packed_by_a_loop(documents, length, frame):
    stream = []
    for document in documents:
        if document:
            stream += document + ([] if frame.between is None else [frame.between])
    sequences, current = [], []
    for token in stream:
        if not current and frame.first is not None:
            current.append(frame.first)
        current.append(token)
        if len(current) + (frame.last is not None) == length:
            sequences.append(current + ([] if frame.last is None else [frame.last]))
            current = []
    return sequences


@settings(deadline=None, max_examples=300)
@given(
    documents=st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12),
    length=st.integers(3, 9),
    frame=st.sampled_from(FRAMES),
)
def test_packing_equals_a_loop(documents, length, frame):
    flat = np.array([token for document in documents for token in document], np.int32)
    packed = pack(flat, [len(document) for document in documents], length, frame)
    assert packed.dtype == np.int32
    assert packed.shape[1] == length
    assert packed.tolist() == packed_by_a_loop(documents, length, frame)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 30), max_size=12), length=st.integers(3, 9), frame=st.sampled_from(FRAMES))
def test_a_line_is_framed_and_cut(ids, length, frame):
    line = truncate(ids, length, frame)
    assert len(line) == min(length, len(ids) + frame.size)
    body = line[frame.first is not None : len(line) - (frame.last is not None)]
    assert body == ids[: len(body)]
    assert frame.first is None or line[0] == frame.first
    assert frame.last is None or line[-1] == frame.last


def test_no_room_beside_the_frame():
    with pytest.raises(ValueError, match="max_seq_length=2 leaves no room"):
        pack(np.array([1, 2], np.int32), [2], 2, Frame(101, 102, 102))


class FakeTokenizer:
    cls_token_id, sep_token_id, eos_token_id = None, None, None

    def __init__(self, **ids):
        self.__dict__.update(ids)


def test_frames_of_tokenizers():
    assert Frame.of(FakeTokenizer(cls_token_id=2, sep_token_id=3, eos_token_id=9)) == Frame(2, 3, 3)
    assert Frame.of(FakeTokenizer(eos_token_id=9)) == Frame(None, None, 9)
    assert Frame.of(FakeTokenizer(sep_token_id=3)) == Frame(None, None, None)
