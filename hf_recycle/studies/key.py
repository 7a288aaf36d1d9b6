"""The key of a run: a hash of all that its result depends on, so that equal runs are done once, and only those."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hf_recycle
from hf_recycle.data.arguments import FACTS
from hf_recycle.data.corpus import corpus_fingerprint

# Where a run goes, what it says and shows, and how its data are prepared.
_NOT_A_RESULT = frozenset(
    {
        "output_dir",
        "resume_from_checkpoint",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "logging_strategy",
        "logging_first_step",
        "logging_steps",
        "logging_nan_inf_filter",
        "include_num_input_tokens_seen",
        "push_to_hub",
        "trust_pickled_checkpoint",
        "preprocessing_num_workers",
    }
)
# Arguments that may name a local file or folder: its content counts, and not where it lies.
_PATHS = (
    "train_file",
    "validation_file",
    "dataset_name",
    "model_name_or_path",
    "config_name",
    "tokenizer_name",
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
)
# Of this package: what measures and draws, and trains nothing.
_NOT_TRAINING = ("analysis", "card", "cli", "plots", "studies")


def run_key(settings: Mapping[str, Any]) -> str:
    """A hash of a run's settings, the content of its data, the code, torch and transformers.

    Of a dataset of the Hub it is the revision, if that can be looked up; of a model or tokenizer of the Hub, its name.
    """
    kept = {name: value for name, value in settings.items() if name not in _NOT_A_RESULT and name[:4] != "hub_"}
    kept |= {name: _content(kept[name]) for name in _PATHS if name in kept}
    parts = [kept, _data(settings), code_version(), *map(version, ("torch", "transformers"))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


@functools.cache
def code_version() -> str:
    """A hash of this package's sources, as far as they train: of the code itself, committed or not."""
    root = Path(hf_recycle.__file__).parent
    paths = (path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in _NOT_TRAINING)
    return _hash_of(root, paths)[:12]


def _data(settings: Mapping[str, Any]) -> str | None:
    """What the settings alone don't tell of the data."""
    name = settings.get("dataset_name")
    if name == FACTS:
        return None
    if name is not None:
        config = settings.get("dataset_config_name")
        return None if Path(str(name)).exists() else _revision(str(name), None if config is None else str(config))
    return None if settings.get("train_file") else corpus_fingerprint()


@functools.cache
def _revision(dataset: str, config: str | None) -> str | None:
    """The revision of a dataset of the Hub; None if it can't be looked up: the run will say why."""
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(dataset, config).hash
    except Exception:  # the Hub, its client and each builder have their own
        return None


def _content(value: Any) -> Any:
    """The content of a file or folder instead of its path; anything else as it is."""
    path = Path(value).expanduser() if isinstance(value, str) else None
    if path is None or not path.exists():
        return value
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    stamps = tuple((each, each.stat().st_size, each.stat().st_mtime_ns) for each in files)
    return {"content": _hash_of_stamped(path, stamps), "suffixes": path.suffixes}


@functools.lru_cache(maxsize=64)
def _hash_of_stamped(root: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Read once for all runs of a study, unless something changes meanwhile."""
    return _hash_of(root, (path for path, _, _ in stamps))


def _hash_of(root: Path, paths: Iterable[Path]) -> str:
    """A hash of files by their names below `root` and their contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
