"""From arguments to packed sequences of token ids, tokenised once and kept between runs."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_recycle.data.arguments import DataArguments
from hf_recycle.data.cache import cache_folder
from hf_recycle.data.packing import Frame, Ids, pack, truncate
from hf_recycle.data.sources import Texts, load_texts
from hf_recycle.data.words import check_words, word_starts
from hf_recycle.errors import UserError
from hf_recycle.internals.of_datasets import fingerprint, with_features
from hf_recycle.mlm.tasks import Task

# Raise it when the steps below change what they write, so that cached sequences are not taken for new ones.
_VERSION = 1
# Documents packed at a time; the tokens that fill no sequence at the end of each such batch are dropped.
_BATCH = 1000
_TYPES = {"input_ids": "int32", "word_starts": "int8"}


def load_data(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, texts: Texts | None = None
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load, tokenise and pack the data `arguments` name.

    Args:
        arguments: what to load, and the length of a sequence.
        tokenizer: a fast tokenizer.
        texts: the documents, when they are open already (`load_texts`).

    Returns:
        Training and validation sequences: `max_seq_length` ids each, or with `line_by_line` at most so many. With
        `whole_word_mask` a column `word_starts` beside them: 1 where a token begins a word, else 0.
        Where nothing names validation data a part of the training sequences is cut off, always the same; a
        stream has no such part, and its validation data is None.

    Raises:
        UserError: see `load_texts`; or there is too little text.
    """
    texts = texts or load_texts(arguments)
    train = _sequences(texts.train, texts.column, tokenizer, arguments)
    validation = None
    if texts.validation is not None:
        validation = _sequences(texts.validation, texts.column, tokenizer, arguments)
    _require_some(train, texts.name, arguments)
    if validation is not None:
        _require_some(validation, f"the validation data of {texts.name}", arguments)
    elif isinstance(train, Dataset):
        train, validation = _cut_off(train, arguments.validation_split_percentage)
    return _first(train, arguments.max_train_samples), _first(validation, arguments.max_eval_samples)


def unigram_entropy(task: Task, train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats per token of `validation` for a model that knows how frequent tokens are in `train`, and no more.

    The floor of a model that ignores context. Tokens that are never a target of the task are left out; each token
    counts once more than it occurs, so that one that `train` lacks costs much and not infinitely much.
    """
    size = len(tokenizer)
    counts, targets = (_token_counts(dataset, size, task.first_predicted) for dataset in (train, validation))
    smoothed = counts + 1.0
    if not task.predicts_special_tokens:
        special = np.array(sorted(set(tokenizer.all_special_ids)), np.int64)
        targets[special] = smoothed[special] = 0
    with np.errstate(divide="ignore"):
        log_probability = np.log(smoothed / smoothed.sum())
    seen = targets > 0
    return float(-(targets[seen] * log_probability[seen]).sum() / targets[seen].sum())


def _token_counts(dataset: Dataset, size: int, first: int, at_most: int = 100_000) -> npt.NDArray[np.int64]:
    """How often each id occurs in (an even sample of) the sequences from their token number `first` on, `(size,)`."""
    step = max(1, len(dataset) // at_most)
    sample = dataset.select(range(0, len(dataset), step)).with_format("arrow")
    counts = np.zeros(size, np.int64)
    for batch in sample.iter(batch_size=10_000):
        ids, lengths = _flat(batch["input_ids"])
        if first:
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            ids = ids[place >= first]
        counts += np.bincount(ids, minlength=size)[:size]
    return counts


def _sequences(
    documents: Dataset | IterableDataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
) -> Dataset | IterableDataset:
    frame = Frame.of(tokenizer)
    length, words = arguments.max_seq_length, arguments.whole_word_mask
    if words:
        check_words(tokenizer)
    features = Features({name: List(Value(kind)) for name, kind in _TYPES.items() if words or name == "input_ids"})
    tokenise = _Tokenise(tokenizer, column, arguments.line_by_line, words)
    shape = _Shape(frame, length, arguments.line_by_line, words)
    if isinstance(documents, IterableDataset):
        columns = documents.column_names or list(with_features(documents).column_names)
        stream = documents.map(tokenise, batched=True, remove_columns=columns, batch_size=_BATCH)
        return stream.map(shape, batched=True, batch_size=_BATCH, features=features)
    kind = [frame, arguments.line_by_line] + ["words"] * words
    key = _key(fingerprint(documents), column, tokenizer_key(tokenizer), *kind)
    shaped_key = _key(key, length)
    path = cache_folder("sequences") / f"{shaped_key}.arrow"
    if path.exists():
        with contextlib.suppress(OSError):  # a shared cache may be another user's
            os.utime(path)  # lets a user see which files are still in use
        return Dataset.from_file(str(path))
    # Two passes, so that packing does not depend on how many processes tokenised, and so that another length
    # need not tokenise again.
    tokenised = documents.map(
        tokenise,
        batched=True,
        batch_size=_BATCH,
        remove_columns=documents.column_names,
        features=features,
        num_proc=arguments.preprocessing_num_workers,
        new_fingerprint=key,
        desc="Tokenising",
    )
    return (
        tokenised.with_format("arrow")
        .map(
            shape,
            batched=True,
            batch_size=_BATCH,
            features=features,
            cache_file_name=str(path),
            new_fingerprint=shaped_key,
            desc="Packing",
        )
        .with_format(None)
    )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names a tokenizer by what it does: its own hash changes after its first call."""
    # A call leaves its truncation and padding in the backend.
    backend = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return _key(backend.to_str(), sorted(tokenizer.special_tokens_map.items(), key=str))


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((_VERSION, *parts)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Tokenise:
    """Documents to ids, without special tokens; empty documents (lines, with `by_line`) vanish."""

    tokenizer: PreTrainedTokenizerBase
    column: str
    by_line: bool
    words: bool = False

    def __call__(self, batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[self.column] if text and not text.isspace()]
        if self.by_line:
            texts = [line for text in texts for line in text.splitlines() if line and not line.isspace()]
        if not texts:
            names = ["input_ids", *(["word_starts"] if self.words else [])]
            return {name: [] for name in names}
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found = {"input_ids": encoded["input_ids"]}
        return found | ({"word_starts": [word_starts(e.word_ids) for e in encoded.encodings]} if self.words else {})


@dataclass(frozen=True)
class _Shape:
    """Ids of documents to sequences: packed full, or one truncated line each."""

    frame: Frame
    length: int
    by_line: bool
    words: bool = False

    def __call__(self, batch: Any) -> Any:
        frames = {"input_ids": self.frame} | ({"word_starts": self.frame.word_starts} if self.words else {})
        rows = {name: self._rows(*_flat(batch[name]), frame) for name, frame in frames.items()}
        if isinstance(batch, dict):
            return rows
        return pa.table({name: _list_array(values, _TYPES[name]) for name, values in rows.items()})

    def _rows(self, flat: Ids, lengths: npt.NDArray[np.int64], frame: Frame) -> list[npt.NDArray[np.int32]]:
        if not self.by_line:
            return list(pack(flat, lengths, self.length, frame))
        lines = np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return [np.array(truncate(line.tolist(), self.length, frame), np.int32) for line in lines if len(line)]


def _list_array(rows: list[npt.NDArray[np.int32]], kind: str) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([*rows, np.empty(0, np.int32)]).astype(kind))


def _flat(column: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All ids of a batch in a row, and how many belong to each document."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.Array):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        return column.flatten().to_numpy(zero_copy_only=False).astype(np.int32), lengths
    lengths = np.array([len(ids) for ids in column], np.int64)
    flat = np.concatenate([np.asarray(ids, np.int32) for ids in column]) if len(column) else np.empty(0, np.int32)
    return flat, lengths


def _require_some(sequences: Dataset | IterableDataset, name: str, arguments: DataArguments) -> None:
    """Refuse data without one whole sequence; of a stream only the first is read."""
    if isinstance(sequences, Dataset):
        empty = len(sequences) == 0
    else:
        empty = next(iter(sequences), None) is None
    if empty:
        raise UserError(
            f"{name} gives not one sequence of max_seq_length={arguments.max_seq_length} tokens; "
            "pass more text, a smaller max_seq_length or line_by_line"
        )


def _cut_off(train: Dataset, percentage: int) -> tuple[Dataset, Dataset]:
    """Every so many-th sequence goes to validation, at least one: evenly spread over all sources."""
    total = len(train)
    if total < 2:
        raise UserError(
            "the training data gives a single sequence, which leaves none to evaluate on; pass more text or a "
            "validation_file"
        )
    count = max(1, round(total * percentage / 100))
    # The last of each of `count` equal parts.
    chosen = (np.arange(1, count + 1) * total) // count - 1
    rest = np.setdiff1d(np.arange(total), chosen, assume_unique=True)
    return train.select(rest), train.select(chosen)


def _first(sequences: Dataset | IterableDataset | None, limit: int | None) -> Any:
    if sequences is None or limit is None:
        return sequences
    if isinstance(sequences, IterableDataset):
        return sequences.take(limit)
    return sequences.select(range(min(limit, len(sequences))))
