"""Examples to padded numpy arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DROPPED = ("labels", "offset_mapping")  # the collator makes the labels; offsets are of no use to a model


@dataclass(frozen=True)
class TokenBatch:
    """Columns of a batch, int64 or float32. Per-token columns are `(batch, sequence)`, `input_ids` (int64)
    among them; others are `(batch, ...)`. `real` is bool `(batch, sequence)`, false for padding (ours, or
    that of the examples' `attention_mask`). `padded` says that padding was added here."""

    columns: dict[str, np.ndarray]
    real: np.ndarray
    padded: bool


def batch_examples(examples: Sequence[Any], tokenizer: Any, pad_to_multiple_of: int | None = None) -> TokenBatch:
    """Stack `examples` (mappings with `input_ids`, or bare sequences of token ids; lists, arrays or
    tensors), padded on the tokenizer's side to the longest and to a multiple of `pad_to_multiple_of`.

    Raises:
        ValueError: no example; ids that are not one-dimensional whole numbers; examples with unlike columns;
            a column that can't become a rectangular array of numbers; padding needed and no padding token.
    """
    if not examples:
        raise ValueError("can't make a batch of no examples")
    values = _columns(examples)
    lengths = np.array([len(ids) for ids in values["input_ids"]])
    longest = int(lengths.max())
    width = longest if pad_to_multiple_of is None else -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    padded = bool((lengths < width).any())
    if padded and tokenizer.pad_token_id is None:
        raise ValueError(f"the examples need padding and {type(tokenizer).__name__} has no padding token")
    left = tokenizer.padding_side == "left"
    fill = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "special_tokens_mask": 1,
    }

    columns = {}
    for name, column in values.items():
        if name == "input_ids" or _is_per_token(column, lengths):
            columns[name] = _stack(column, lengths, width, left, fill.get(name, 0), name)
        elif name in fill:
            raise ValueError(f"column {name!r} must have one entry for each of the input_ids")
        else:
            columns[name] = _array(column, name)
    if columns["input_ids"].dtype != np.int64:
        raise ValueError("input_ids must be whole numbers")
    if "attention_mask" in columns:
        real = columns["attention_mask"] != 0
    else:
        places = np.arange(width)
        real = places >= (width - lengths)[:, None] if left else places < lengths[:, None]
    return TokenBatch(columns, real, padded)


def _columns(examples: Sequence[Any]) -> dict[str, list[Any]]:
    """The examples' values by column, arrays where they are not lists."""
    if not isinstance(examples[0], Mapping):
        examples = [{"input_ids": example} for example in examples]
    names = [name for name in examples[0] if name not in _DROPPED]
    if "input_ids" not in names:
        raise ValueError(f"an example has no input_ids: its columns are {sorted(examples[0])}")
    try:
        rows = {name: [example[name] for example in examples] for name in names}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the examples of a batch must have the same columns, like {names}") from error
    # numpy reads a list of lists fast, a list of tensors number by number.
    return {name: [v if isinstance(v, list) else np.asarray(v) for v in column] for name, column in rows.items()}


def _is_per_token(column: list[Any], lengths: np.ndarray) -> bool:
    return all(_is_flat(v) and len(v) == n for v, n in zip(column, lengths, strict=True))


def _is_flat(value: Any) -> bool:
    if isinstance(value, list):  # asking numpy would convert the whole list
        return not value or np.ndim(value[0]) == 0
    return value.ndim == 1


def _stack(column: list[Any], lengths: np.ndarray, width: int, left: bool, fill: int | None, name: str) -> np.ndarray:
    if (lengths == width).all():
        return _array(column, name, ndim=2)
    values = [_array(value, name, ndim=1) for value in column]
    out = np.full((len(values), width), fill, dtype=np.result_type(*values))
    for row, value in zip(out, values, strict=True):
        row[width - len(value) if left else 0 :][: len(value)] = value
    return out


def _array(value: Any, name: str, ndim: int | None = None) -> np.ndarray:
    """`value` as an array of int64, or of float32 where it has fractions."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {name!r} can't be made a rectangular array of numbers") from error
    if array.dtype.kind not in "biuf" or (ndim is not None and array.ndim != ndim):
        raise ValueError(f"column {name!r} can't be made a batch: dtype {array.dtype}, shape {array.shape}")
    # numpy calls an empty list float64
    return array.astype(np.float32 if array.dtype.kind == "f" and array.size else np.int64, copy=False)
