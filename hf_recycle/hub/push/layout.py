"""Which files of a folder are published, by name, and which published ones a new push replaces.

Nothing else goes up: a folder may hold notebooks, logs, data and keys of anybody, and no list of those is complete.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from hf_recycle.records.ceiling_file import CEILING_FILE
from hf_recycle.records.files import RECYCLING_FILES

CARD = "README.md"

_SHARDS = r"(-\d+-of-\d+)?"
_MODEL = re.compile(rf"model{_SHARDS}\.safetensors|model\.safetensors\.index\.json")
_ADAPTER = re.compile(rf"adapter_model{_SHARDS}\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json")
_PICKLED = re.compile(rf"pytorch_model{_SHARDS}\.bin|pytorch_model\.bin\.index\.json")
_WEIGHTS = (_MODEL, _ADAPTER, _PICKLED)
# Configurations, and what transformers' tokenizers and processors save (their VOCAB_FILES_NAMES).
_DESCRIPTIONS = {
    *("config.json", "generation_config.json", "adapter_config.json", CARD, CEILING_FILE, *RECYCLING_FILES),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "entity_vocab.json", "normalizer.json"),
    *("tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model"),
    *("spm_char.model", "source.spm", "target.spm", "vocab-src.json", "vocab-tgt.json", "target_vocab.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
}
_IN_FOLDERS = re.compile(
    r"figures/(loss|recycle_counts|ages|magnitudes|ceiling)\.png|additional_chat_templates/[A-Za-z0-9_-]+\.jinja"
)
# What only resuming needs: the Trainer's files, and the shards of torch.distributed.checkpoint and DeepSpeed.
_STATE = re.compile(
    r"trainer_state\.json|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|pytorch_model_fsdp\.bin"
    r"|(pytorch_model_fsdp|optimizer)_\d+/(__\d+_\d+\.distcp|\.metadata)"
    r"|latest(_universal)?|global_step\d+/[a-z0-9_-]+_states\.pt"
)
_FOLDERS = re.compile(r"figures|additional_chat_templates|(pytorch_model_fsdp|optimizer)_\d+|global_step\d+")
_FIGURE = re.compile(r"figures/[\w./-]+")


def checkpoint_files(folder: Path) -> list[str]:
    """Everything of a checkpoint that is published, as sorted relative POSIX paths."""
    return [name for name in _files(folder) if _is_of_model(name) or _STATE.fullmatch(name)]


def model_files(folder: Path) -> list[str]:
    """Those that belong at the root of a repository: the model and what describes it, not what training resumes."""
    return [name for name in _files(folder) if _is_of_model(name)]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model, or an adapter, that can be published."""
    return folder.is_dir() and any(is_weights(name) for name in model_files(folder))


def is_weights(name: str) -> bool:
    return any(family.fullmatch(name) for family in _WEIGHTS) and not name.endswith(".json")


def replaced_files(
    present: Iterable[str], added: Collection[str], checkpoint: str | None, old_card: str, new_card: str
) -> list[str]:
    """Files in the repository that a push takes away, because they would contradict what it adds.

    At the root these are the same kind of weights under other names (shards of another number, which some loaders
    prefer) and figures that the card showed and shows no longer; in the folder of the checkpoint, everything it does
    not hold any more. Whatever else is there is the user's, such as an adapter beside the full model.

    Args:
        present: the files of the repository.
        added: those of the push.
        checkpoint: the folder of the repository that the push fills, if any.
        old_card, new_card: the repository's README before and after.
    """
    families = [family for family in _WEIGHTS if any(family.fullmatch(name) for name in added)]
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


def _is_of_model(name: str) -> bool:
    known = name in _DESCRIPTIONS or _IN_FOLDERS.fullmatch(name)
    return bool(known or any(family.fullmatch(name) for family in _WEIGHTS))


def _files(folder: Path) -> list[str]:
    """The files of a folder and of those right under it, without links, which may lead anywhere."""
    root = folder.resolve()
    places = [root, *(path for path in root.iterdir() if _FOLDERS.fullmatch(path.name) and path.is_dir())]
    found = [path for place in places for path in place.iterdir() if path.is_file() and path.resolve() == path]
    return sorted(path.relative_to(root).as_posix() for path in found)
