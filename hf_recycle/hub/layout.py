"""Which files of a checkpoint or an output folder are published, and which published ones a new push replaces."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

CARD = "README.md"

# What only resuming needs: the Trainer's, Accelerate's and DeepSpeed's names. At the root of a repository lies a model.
_STATE = re.compile(
    r"optimizer(_\d+)?(\.(pt|bin))?|scheduler\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
    r"|pytorch_model_fsdp(_\d+)?(\.bin)?|(global_step|universal)\d*|latest(_universal)?|zero_to_\w+\.py"
)
# Logs name the machine, and hidden files are nobody else's business.
_INDEX = ".metadata"  # of a sharded state: torch.distributed.checkpoint can read nothing without it
_NEVER = ("*.log", "events.out.tfevents.*", ".*", "__pycache__")
# Only directly in the folder, where loggers and we ourselves have folders; sharded states have files like __0_0.distcp.
_NEVER_ON_TOP = (
    "runs",
    "wandb",
    "mlruns",
    "trackio",
    "logs",
    "_*",
    "tmp-*",
    "unpublished",
    "checkpoint-*",
    "last-checkpoint",
    "checkpoint_files.json",  # of what lies in a checkpoint here; there, some of it is left out or reworded
    # What a study keeps of its runs; it names folders of this machine.
    "study_settings.yaml",
    "study_result.json",
    "study_prune_curves.json",
)
_SAFETENSORS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_PICKLED = re.compile(r"(pytorch_model|adapter_model)(-\d+-of-\d+)?\.bin(\.index\.json)?")
_FIGURE = re.compile(r"figures/[\w./-]+")


def checkpoint_files(folder: Path) -> list[str]:
    """Everything that may be published of a checkpoint, as sorted relative POSIX paths."""
    return sorted(_walk(folder, PurePosixPath()))


def model_files(folder: Path) -> list[str]:
    """Those that belong at the root of a repository: the model and what describes it, not what training resumes."""
    return [name for name in checkpoint_files(folder) if not _STATE.fullmatch(PurePosixPath(name).parts[0])]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model, or an adapter, that can be published."""
    return folder.is_dir() and any(is_weights(path.name) for path in folder.iterdir())


def is_weights(name: str) -> bool:
    return bool(_SAFETENSORS.fullmatch(name) or _PICKLED.fullmatch(name)) and not name.endswith(".json")


def replaced_files(
    present: Iterable[str], added: Collection[str], checkpoint: str | None, old_card: str, new_card: str
) -> list[str]:
    """Files in the repository that a push takes away, because they would contradict what it adds.

    At the root these are weights under other names (shards of another number, which some loaders prefer) and figures
    that the card showed and shows no longer; in the folder of the checkpoint, everything it does not hold any more.
    Whatever else is there is the user's.

    Args:
        present: the files of the repository.
        added: those of the push.
        checkpoint: the folder of the repository that the push fills, if any.
        old_card, new_card: the repository's README before and after.
    """
    families = [_SAFETENSORS, *([_PICKLED] if any(_PICKLED.fullmatch(name) for name in added) else [])]
    dropped_figures = set(_FIGURE.findall(old_card)) - set(_FIGURE.findall(new_card))
    return [
        name
        for name in present
        if name not in added
        and (
            any(family.fullmatch(name) for family in families)
            or name in dropped_figures
            or (checkpoint is not None and name.startswith(f"{checkpoint}/"))
        )
    ]


def _walk(folder: Path, inside: PurePosixPath) -> Iterable[str]:
    for path in folder.iterdir():
        patterns = _NEVER if inside.parts else (*_NEVER, *_NEVER_ON_TOP)
        is_index = path.name == _INDEX and bool(inside.parts)
        if not is_index and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns):
            continue
        if path.is_symlink() and path.is_dir():
            continue  # it may lead anywhere, also back
        if path.is_dir():
            yield from _walk(path, inside / path.name)
        elif path.is_file():
            yield str(inside / path.name)
