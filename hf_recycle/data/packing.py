"""Token ids of documents cut into full sequences: pure functions on numpy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Frame:
    """What is put around a sequence and between two documents: token ids, or None for nothing."""

    first: int | None
    last: int | None
    between: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Frame":
        """[CLS] ... [SEP] where the tokenizer has both; else documents are joined by end-of-text."""
        cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        if cls_id is not None and sep_id is not None:
            return cls(cls_id, sep_id, sep_id)
        return cls(None, None, tokenizer.eos_token_id)

    @property
    def word_starts(self) -> "Frame":
        """The frame of a sequence of marks, where each token of this one begins a word of its own."""
        return Frame(*(None if token is None else 1 for token in (self.first, self.last, self.between)))

    @property
    def size(self) -> int:
        """Tokens of the frame in one sequence."""
        return (self.first is not None) + (self.last is not None)


def pack(flat: Ids, lengths: Sequence[int] | npt.NDArray[np.integer], max_seq_length: int, frame: Frame) -> Ids:
    """Join documents and cut them into full sequences.

    Args:
        flat: `(tokens,)`, the ids of all documents, one after the other, without special tokens.
        lengths: `(documents,)`, how many of them each document has.
        max_seq_length: tokens of a sequence, its frame included.
        frame: what goes around a sequence and between documents.

    Returns:
        `(sequences, max_seq_length)` ids. The tokens that fill no sequence at the end are dropped.

    Raises:
        ValueError: a sequence has no room beside its frame.
    """
    room = max_seq_length - frame.size
    if room < 1:
        raise ValueError(f"max_seq_length={max_seq_length} leaves no room for text beside {frame.size} special tokens")
    stream = _join(np.asarray(flat, np.int32), np.asarray(lengths, np.int64), frame.between)
    count = len(stream) // room
    sequences = np.empty((count, max_seq_length), np.int32)
    start = 0
    if frame.first is not None:
        sequences[:, 0] = frame.first
        start = 1
    sequences[:, start : start + room] = stream[: count * room].reshape(count, room)
    if frame.last is not None:
        sequences[:, -1] = frame.last
    return sequences


def _join(flat: Ids, lengths: npt.NDArray[np.int64], between: int | None) -> Ids:
    """The documents in one row, `between` after each of them but empty ones."""
    lengths = lengths[lengths > 0]
    if between is None or len(lengths) == 0:
        return flat
    # np.insert wants positions in the old array: the end of every document.
    return np.insert(flat, np.cumsum(lengths), between).astype(np.int32, copy=False)


def truncate(ids: Sequence[int], max_seq_length: int, frame: Frame) -> list[int]:
    """One line as one sequence of at most `max_seq_length` ids, frame included, not padded."""
    room = max_seq_length - frame.size
    body = list(ids[:room])
    return [
        *([] if frame.first is None else [frame.first]),
        *body,
        *([] if frame.last is None else [frame.last]),
    ]
