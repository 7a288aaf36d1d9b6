"""What the files of a repository may be called, and which of them make a checkpoint."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from hf_recycle.errors import UserError
from hf_recycle.hub.address import LAST, HubAddress
from hf_recycle.hub.checks.sizes import small_file_problem
from hf_recycle.records.files import RECYCLING_FILES

MAX_FILES = 100_000

STATE_FILES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_[0-9]*.pth"),
    *("optimizer.bin", "pytorch_model_fsdp.bin"),
)
"""Files that the Trainer reads with `torch.load(weights_only=True)`; shell patterns, as the next ones."""
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors")
_SMALL = (
    *("trainer_state.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", INDEX),
)
WANTED = (*STATE_FILES, *WEIGHTS, *_SMALL, *RECYCLING_FILES)
"""Everything that training goes on from, unless the checkpoint is sharded."""
# DeepSpeed's and torch.distributed.checkpoint's shards, which these libraries unpickle.
_PICKLED = re.compile(
    r"(global_step|universal)[^/]*/|latest(_universal)?$|[^/]*_[0-9]+/|(.*/)?\.metadata$|.*\.distcp$|"
    r"(zero|bf16_zero)_pp_rank"
)
# Never needed, and never fetched: transformers unpickles the one, a user may run the other.
_LEFT_OUT = re.compile(r"(.*/)?training_args\.bin|.*\.pyc?|(.*/)?pytorch_model(-.*)?\.bin|.*\.pkl|.*\.pickle")

_CHECKPOINT = re.compile(rf"(?P<folder>{LAST}|checkpoint-[0-9]{{1,18}})/(?P<name>.+)", re.DOTALL)


def is_one_of(patterns: Iterable[str], name: str) -> bool:
    """Whether a file lies directly in its folder and has one of these names."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def check_names(where: object, names: Iterable[str]) -> None:
    """Refuses a repository with a file that could be written to another place than its own.

    Raises:
        UserError: with the first such name.
    """
    for name in names:
        if problem := _hostile(name):
            shown = ascii(name) if len(name) <= 80 else f"{name[:80]!a}..."
            raise UserError(f"{where}: the repository has a file named {shown}, {problem}; nothing of it was fetched")


def _hostile(name: str) -> str | None:
    if not name or any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "with control characters in it"
    if "\\" in name or re.match(r"[A-Za-z]:", name) or name.startswith(("/", "~")):
        return "which is not a relative path"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "which leads out of its folder"
    if len(name) > 1000 or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        return "which is too long"
    return None


def by_checkpoint(names: Iterable[str]) -> dict[str, list[str]]:
    """The checkpoint folders of a repository and the names of their files, relative to the folder."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _CHECKPOINT.fullmatch(name):
            found.setdefault(match["folder"], []).append(match["name"])
    return found


def missing_files(names: Iterable[str], trust_pickled: bool = False) -> list[str]:
    """What training needs to go on and a checkpoint lacks."""
    names = set(names)
    shards = any(_PICKLED.match(name) for name in names)
    needed = {
        "trainer_state.json": "trainer_state.json" in names,
        "the weights (model.safetensors)": bool(names & {"model.safetensors", INDEX, "pytorch_model_fsdp.bin"}),
        "optimizer.pt": bool(names & {"optimizer.pt", "optimizer.bin"}),
        "scheduler.pt": "scheduler.pt" in names,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    if shards and trust_pickled:  # weights, optimizer and scheduler may be in the shards
        needed = {"trainer_state.json": needed["trainer_state.json"]}
    return [name for name, present in needed.items() if not present]


def wanted_files(address: HubAddress, names: Iterable[str], trust_pickled: bool) -> list[str]:
    """Those files of a checkpoint that training goes on from.

    Args:
        names: relative to the checkpoint's folder.
        trust_pickled: take shards that DeepSpeed or torch.distributed.checkpoint will unpickle.

    Raises:
        UserError: there are shards and they are not trusted.
    """
    names = sorted(names)
    if not trust_pickled:
        refuse_pickled(address, names, f"the owner of {address.repo_id}")
    elif any(_PICKLED.match(name) for name in names):
        return [name for name in names if not _LEFT_OUT.fullmatch(name)]
    return [name for name in names if is_one_of(WANTED, name)]


def refuse_pickled(where: object, names: Iterable[str], owner: str) -> None:
    """Refuses a checkpoint with shards that DeepSpeed or torch.distributed.checkpoint would unpickle.

    Args:
        where: what to call it.
        names: its files, relative to its folder; folders, if given, end with a slash.
        owner: who would have to be trusted.

    Raises:
        UserError: there are such shards.
    """
    if pickled := [name for name in sorted(names) if _PICKLED.match(name)]:
        raise UserError(
            f"{where}: the checkpoint is sharded ({pickled[0]}), and the library that wrote it reads it by "
            "unpickling, so whoever wrote it can run any code on this machine; pass --trust_pickled_checkpoint "
            f"if you trust {owner}"
        )


def check_sizes(address: HubAddress, sizes: Mapping[str, int], free: int) -> None:
    """Refuses files that claim to be larger than their kind can be, or than the disk has room for.

    Args:
        sizes: bytes by name, relative to the checkpoint's folder.
        free: bytes free where they will lie.
    """
    for name, size in sizes.items():
        if problem := small_file_problem(name, size):
            raise UserError(f"{address}: {name} is not to be trusted ({problem}); nothing of it was fetched")
    total = sum(sizes.values())
    if total > free:
        raise UserError(
            f"{address}: the checkpoint takes {total} bytes and {free} are free in the cache; make room, or set "
            "HF_HUB_CACHE to a folder with more"
        )
