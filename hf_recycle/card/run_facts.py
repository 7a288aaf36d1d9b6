"""What a run was: collected while it trains, stored as `run` in `recycling_config.json`, told by the card."""

import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import torch
from transformers import Trainer

from hf_recycle import __version__
from hf_recycle.hub.scrub import Secrets, is_private
from hf_recycle.internals.of_transformers import is_from_files
from hf_recycle.neurons.slices import full_shape
from hf_recycle.records.run_schema import MAX_TEXT

# What the arguments derive from others or from the machine, and what is said elsewhere in the card.
_DERIVED = {
    "accelerator_config",
    "dataloader_pin_memory",
    "deepspeed",
    "disable_tqdm",
    "fsdp_config",
    "greater_is_better",
    "hub_language",
    "hub_license",
    "hub_model_id",
    "local_rank",
    "metric_for_best_model",
    "project",
    "push_to_hub",
    "report_to",
    "trackio_space_id",
    "use_cpu",
}
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub")


def run_facts(trainer: Trainer) -> dict[str, Any]:
    """The facts of a run, without secrets, paths and names of the machine; `run_schema` lists their keys.

    `trainer.run_context`, where it is set, adds what the trainer can't know or knows less well (the command, the
    data, the base model, further arguments), with the same keys.
    """
    context = dict(getattr(trainer, "run_context", {}))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    changed, unchanged = split_arguments(trainer.args)
    facts = {
        "model": model_facts(model),
        "base_model": _base_model(model),
        "data": _data(trainer.train_dataset),
        "tokenizer": _tokenizer(trainer.processing_class),
        "hardware": hardware(trainer),
        "versions": {
            "python": platform.python_version(),
            "hf_recycle": __version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "card": dict(getattr(trainer, "card_words", {})),
        **context,
        "arguments": {**context.get("arguments", {}), **changed},
        "defaults": {**context.get("defaults", {}), **unchanged},
    }
    return _clipped(
        Secrets.of_this_machine(trainer.args.hub_token, output_dir=trainer.args.output_dir or "").facts(facts)
    )


def split_arguments(arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a dataclass of arguments: those that differ from their defaults, and the others."""
    changed: dict[str, Any] = {}
    unchanged: dict[str, Any] = {}
    for item in fields(arguments):
        if not item.init or is_private(item.name) or item.name in _DERIVED:
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        value = _plain(getattr(arguments, item.name))
        differs = value != _plain(default) and not _same_by_derivation(item.name, value, arguments)
        (changed if differs else unchanged)[item.name] = value
    return changed, unchanged


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no number for it
    # Where a list, a mapping or a text of them is allowed, the arguments turn "nothing" into an empty one.
    return None if value in ("", [], {}) else value


def _same_by_derivation(name: str, value: Any, arguments: Any) -> bool:
    """Whether the arguments set a value by themselves, from another one."""
    return (
        (name in ("recycle_seed", "prune_seed", "overtrain_seed") and value == arguments.seed)
        or (name == "do_eval" and value is True and _plain(arguments.eval_strategy) != "no")
        or (name in ("activation_checkpointing", "gradient_checkpointing") and not value)
    )


def model_facts(model: torch.nn.Module) -> dict[str, Any]:
    """The class of a model and the number of its parameters, also where they are sharded."""
    # A parameter sharded by DeepSpeed's stage 3 is empty and keeps its size elsewhere.
    sizes = {id(p): full_shape(p).numel() for p in model.parameters()}
    # FSDP2 puts its name before that of the class.
    return {"architecture": type(model).__name__.removeprefix("FSDP"), "parameters": int(sum(sizes.values()))}


def _base_model(model: torch.nn.Module) -> dict[str, Any] | None:
    """The model of the Hub whose weights were loaded; None for a model from scratch or from a local folder."""
    name = getattr(model, "name_or_path", "")
    if not is_from_files(model) or not is_repo_id(name) or os.path.isdir(name):
        return None
    return {"name": name, "revision": None}  # which one it was, transformers does not keep


def _data(dataset: Any) -> dict[str, Any]:
    """Repositories that a dataset of the `datasets` library was downloaded from."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = {match[1] for source in sources if (match := re.match(r"hf://datasets/([^/@]+(?:/[^/@]+)?)@", source))}
    config = getattr(getattr(dataset, "info", None), "config_name", None)
    return {"datasets": sorted(found), "config": config if len(found) == 1 and config != "default" else None}


def _tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    try:
        size = len(tokenizer)
    except TypeError:  # none, or a processor of something else than text
        return None
    name = getattr(tokenizer, "name_or_path", "")
    mask = getattr(tokenizer, "mask_token", None)
    return {
        "name": name if is_repo_id(name) and not os.path.isdir(name) else None,
        "vocabulary": size,
        "mask": mask if isinstance(mask, str) else None,
    }


def hardware(trainer: Trainer) -> dict[str, Any]:
    """On what a training runs: device, number of processes, engine and precision."""
    args, device = trainer.args, trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        engine = f"DeepSpeed ZeRO stage {stage}"
    elif trainer.is_fsdp_enabled:
        engine = "FSDP2"
    else:
        engine = "one process" if args.world_size == 1 else "DistributedDataParallel"
    return {"device": name, "processes": args.world_size, "engine": engine, "precision": precision(trainer)}


def precision(trainer: Trainer) -> str:
    """What a training computes in: mixed, or the dtype of its weights."""
    assert trainer.model is not None
    if trainer.args.fp16 or trainer.args.bf16:
        return "fp16 mixed" if trainer.args.fp16 else "bf16 mixed"
    return str(next(trainer.model.parameters()).dtype).removeprefix("torch.")


def is_repo_id(name: Any) -> bool:
    """Whether `name` has the form of a repository's name on the Hub."""
    return isinstance(name, str) and re.fullmatch(r"(?:[\w][\w.-]{0,95}/)?[\w][\w.-]{0,95}", name, re.ASCII) is not None


def _clipped(value: Any) -> Any:
    """Long texts shortened: facts must never be too long to be stored."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT // 4 else value[: MAX_TEXT // 4 - 1] + "…"
    if isinstance(value, Mapping):
        return {key: _clipped(item) for key, item in list(value.items())[:500]}
    if isinstance(value, list):
        return [_clipped(item) for item in value[:100]]
    return value
