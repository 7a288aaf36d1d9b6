"""The files of a checkpoint: their names, one writer and one reader each.

Readers bound sizes, check checksums and shapes, and never unpickle anything. Whatever is wrong raises
`RecyclingFileError`. Files that others wrote are held to more, see `hub.checks.recycling_files`.

Writers check what they are given in the same way, and what they write is whole or absent. That all four belong
together is the care of `file_set`.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch

from hf_recycle import __version__
from hf_recycle.errors import first_line
from hf_recycle.records.file_checks import (
    FORMAT_VERSION,
    RecyclingFileError,
    check_config,
    check_state,
    check_stats,
    check_version,
    fail,
)
from hf_recycle.records.history_checks import check_history
from hf_recycle.utils.whole_files import put, write_bytes

CONFIG_FILE = "recycling_config.json"
STATE_FILE = "recycling_state.safetensors"
HISTORY_FILE = "recycling_history.parquet"
STATS_FILE = "recycling_stats.json"
RECYCLING_FILES = (CONFIG_FILE, STATE_FILE, HISTORY_FILE, STATS_FILE)

_MAX_JSON = 16 * 2**20
_MAX_PARQUET = 2 * 2**30
_MAX_STATE = 64 * 2**30
_CHECKSUM = "sha256"
_VERSIONS = {"format_version": str(FORMAT_VERSION), "package_version": __version__}

Folder = str | os.PathLike[str]


def write_config(folder: Folder, config: Mapping[str, Any]) -> Path:
    """Write `recycling_config.json`; returns its path.

    Args:
        config: `{"arguments": {field: value}, "blocks": [{"name", "num_neurons", "gated"}, ...]}`; the
            versions are added where they are missing, other keys are kept.
    """
    path = Path(folder, CONFIG_FILE)
    config = _with_versions(config)
    check_config(path, config)
    return write_json(path, config)


def read_config(folder: Folder) -> dict[str, Any]:
    """Read and check `recycling_config.json`: see `write_config` for its keys."""
    path = Path(folder, CONFIG_FILE)
    config = read_json(path)
    check_config(path, config)
    return config


def write_stats(folder: Folder, stats: Mapping[str, Any]) -> Path:
    """Write `recycling_stats.json`, the content that `summarize` makes; NaN and infinity become null."""
    path = Path(folder, STATS_FILE)
    stats = _without_nan(_with_versions(stats))
    check_stats(path, stats)
    return write_json(path, stats)


def read_stats(folder: Folder) -> dict[str, Any]:
    """Read and check `recycling_stats.json`: see `summarize` for its keys."""
    path = Path(folder, STATS_FILE)
    stats = read_json(path)
    check_stats(path, stats)
    return stats


def write_state(folder: Folder, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write `recycling_state.safetensors`; returns its path.

    Args:
        tensors: per block `{block}/counts` int32, `{block}/last_phase` int32, `{block}/last_step` int64, all
            (d_ff,); any tensors under `{block}/fade_in/` and `trainer/`. On any device.
    """
    path = Path(folder, STATE_FILE)
    check_state(path, tensors)
    # Clones: safetensors refuses views that share memory, and a checksum needs the bytes on the CPU.
    owned = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    texts = {**_VERSIONS, _CHECKSUM: _checksum(owned)}
    return put(path, lambda temporary: safetensors.torch.save_file(owned, temporary, metadata=texts))


def read_state(folder: Folder, blocks: Sequence[Mapping[str, Any]] | None = None) -> dict[str, torch.Tensor]:
    """Read and check `recycling_state.safetensors`: its tensors, on the CPU, see `write_state`.

    Args:
        blocks: the config's blocks, to check that the state holds exactly these, with their sizes.
    """
    path = Path(folder, STATE_FILE)
    _check_size(path, _MAX_STATE)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            _check_text_version(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except RecyclingFileError:
        raise
    except Exception as error:  # a damaged file makes the parser raise many things
        fail(path, f"it can't be read as safetensors ({first_line(error)})")
    # The checksum finds damage, not malice: who rewrites the tensors can rewrite it. Hence the checks too.
    if metadata.get(_CHECKSUM) != _checksum(tensors):
        fail(path, "it was changed or damaged after it was written (its checksum is missing or wrong)")
    check_state(path, tensors, blocks)
    return tensors


def write_history(folder: Folder, table: pa.Table) -> Path:
    """Write `recycling_history.parquet` from `HistoryRecorder.to_table()`; returns its path."""
    path = Path(folder, HISTORY_FILE)
    check_history(path, table)
    table = table.replace_schema_metadata(_VERSIONS)
    return put(path, lambda temporary: pq.write_table(table, temporary, compression="zstd", write_page_checksum=True))


def read_history(folder: Folder, blocks: Sequence[Mapping[str, Any]] | None = None) -> pa.Table:
    """Read and check `recycling_history.parquet`: a table with `recorder.HISTORY_SCHEMA`.

    Args:
        blocks: the config's blocks, to check names of blocks and indices of neurons.
    """
    path = Path(folder, HISTORY_FILE)
    _check_size(path, _MAX_PARQUET)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            texts = file.schema_arrow.metadata or {}
            _check_text_version(path, {key.decode(): value.decode() for key, value in texts.items()})
            table = file.read()
        table.validate(full=True)
        table = table.replace_schema_metadata(None)
        check_history(path, table, blocks)
    except RecyclingFileError:
        raise
    except Exception as error:  # a damaged file makes the parser raise many things
        fail(path, f"it can't be read as parquet ({first_line(error)})")
    return table


def _check_text_version(path: Path, metadata: Mapping[str, str]) -> None:
    text = metadata.get("format_version", "")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    check_version(path, number, metadata.get("package_version"))


def _with_versions(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "package_version": __version__, **content}


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON object that is whole or absent; returns its path."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        data = text.encode("utf-8")
    except (TypeError, ValueError) as error:
        fail(path, f"its content is not JSON ({first_line(error)})", "write only numbers, texts and lists")
    return write_bytes(path, data)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of finite numbers."""
    _check_size(path, _MAX_JSON)
    try:
        content = json.loads(
            path.read_bytes().decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
        )
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair can't be printed
    except (OSError, ValueError, RecursionError) as error:
        fail(path, f"it can't be read as JSON ({first_line(error)})")
    if not isinstance(content, dict):
        fail(path, f"it holds a {type(content).__name__} where an object is expected")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("one key occurs twice in an object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check_size(path: Path, most: int) -> None:
    try:
        if not path.exists():
            fail(path, "the file is missing", "use a checkpoint that was written by hf_recycle")
        if not path.is_file():
            fail(path, "it is not a regular file")
        size = path.stat().st_size
    except OSError as error:
        fail(path, f"it can't be opened ({first_line(error)})")
    if size > most:
        fail(path, f"it has {size:,} bytes and at most {most:,} are expected")


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of contiguous CPU tensors."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
