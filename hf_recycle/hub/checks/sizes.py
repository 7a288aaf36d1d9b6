"""How large the small files of a checkpoint may be: looked at before they are downloaded, and before they are read.

JSON takes some twenty times its size in memory, and nothing of a model's configuration or of a run's record is large.
"""

from fnmatch import fnmatchcase

_MIB = 2**20
_MOST = {
    "config.json": 4 * _MIB,
    "generation_config.json": _MIB,
    "special_tokens_map.json": _MIB,
    "tokenizer_config.json": 16 * _MIB,  # the added tokens, one by one
    "added_tokens.json": 16 * _MIB,
    "tokenizer.json": 64 * _MIB,  # of a vocabulary of 256,000 it has 33
    "vocab.json": 64 * _MIB,
    "vocab.txt": 64 * _MIB,
    "merges.txt": 64 * _MIB,
    "model.safetensors.index.json": 16 * _MIB,
    "trainer_state.json": 64 * _MIB,  # a long run logs a lot
    "recycling_config.json": 4 * _MIB,
    "recycling_stats.json": 16 * _MIB,
    "recycling_ceiling.json": 4 * _MIB,
    "recycling_history.parquet": 1024 * _MIB,
    "rng_state*.pth": 4 * _MIB,  # 15 KiB, and 16 bytes for each accelerator
    "scheduler.pt": 4 * _MIB,
    "scaler.pt": _MIB,
}
SMALL_FILES = tuple(name for name in _MOST if "*" not in name)


def small_file_problem(name: str, size: int) -> str | None:
    """What is wrong with a file of this name and size in bytes; None if nothing is, or if its kind may be large."""
    most = next((most for pattern, most in _MOST.items() if fnmatchcase(name, pattern)), None)
    if most is None or size <= most:
        return None
    return f"it has {size:,} bytes and such a file has at most {most:,}"
