"""Facts for the model card that only the command line knows."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from hf_recycle.card.facts import BUILT_IN_CORPUS
from hf_recycle.card.run_facts import is_repo_id, split_arguments
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.hub.scrub import Secrets
from hf_recycle.runs.parse import RunArguments
from hf_recycle.runs.recipes import recipe_names

_LOCAL = ("train_file", "validation_file", "dataset_name", "model_name_or_path", "config_name", "tokenizer_name")


def run_context(arguments: RunArguments, words: Sequence[str], unigram_entropy: float | None) -> dict[str, Any]:
    """Facts for `RecyclingTrainer.run_context`.

    Args:
        words: the command line after `hf-recycle train`.
        unigram_entropy: of the validation data, in nats.
    """
    changed, unchanged = split_arguments(arguments.model)
    for mine, more in zip((changed, unchanged), split_arguments(arguments.data), strict=True):
        mine |= more
    # Relative paths as well say where things lie on this machine.
    changed |= {name: Path(changed[name]).name for name in _LOCAL if name in changed and os.path.exists(changed[name])}
    return {
        "command": Secrets.of_this_machine().command(["hf-recycle", "train", *words], recipe_names()),
        "arguments": changed,
        "defaults": unchanged,
        "base_model": _base_model(arguments.model),
        "data": _data(arguments.data),
        "unigram_entropy": unigram_entropy,
    }


def _data(data: DataArguments) -> dict[str, Any]:
    files = [Path(file).name for file in (data.train_file, data.validation_file) if file]
    if data.dataset_name:
        local = data.are_facts or os.path.exists(data.dataset_name) or not is_repo_id(data.dataset_name)
        name = Path(data.dataset_name).name
        config = None if local else data.dataset_config_name
        return {"name": name, "datasets": [] if local else [data.dataset_name], "config": config, "files": files}
    return {"name": files[0] if files else BUILT_IN_CORPUS, "datasets": [], "files": files}


def _base_model(model: ModelArguments) -> dict[str, Any] | None:
    name = model.model_name_or_path
    if name is None or os.path.isdir(name) or not is_repo_id(name):
        return None
    # The commit that was loaded just now is the one in the cache.
    cached = try_to_load_from_cache(name, "config.json", revision=model.model_revision)
    commit = Path(cached).parent.name if isinstance(cached, str) else ""
    return {"name": name, "revision": commit if re.fullmatch("[0-9a-f]{40}", commit) else None}
