"""A checkpoint of another feed-forward width, which training goes on from: everything in it that knows of neurons.

The new one is written as one process would: one process, DDP and FSDP2 go on from it alike.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from hf_recycle.analysis.data_scores import ModelNeurons
from hf_recycle.analysis.evaluation import EvaluationSettings, load_language_model
from hf_recycle.analysis.resize import Resized, ResizeSettings, resize_model
from hf_recycle.analysis.shrink_files import load_model
from hf_recycle.analysis.source import Source
from hf_recycle.card.card import write_card
from hf_recycle.card.run_facts import model_facts
from hf_recycle.checkpoints.file_list import LIST_FILE, check_list, write_list
from hf_recycle.checkpoints.run_folder import install, staging_folder, step_of_name
from hf_recycle.engines.optimizer_files import OPTIMIZER_FILES, PLAIN, read_optimizer
from hf_recycle.engines.resume import zero_partitions
from hf_recycle.errors import UserError, first_line
from hf_recycle.methods.recycling.selection import is_immune
from hf_recycle.neurons.blocks import FeedForward, magnitudes_of
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.neurons.magnitudes import on_cpu
from hf_recycle.neurons.optimizer_state import resized_entry
from hf_recycle.neurons.width import Field, Value
from hf_recycle.records.file_set import FileSet, read_files, write_files
from hf_recycle.records.files import CONFIG_FILE, RECYCLING_FILES
from hf_recycle.records.recorder import HistoryRecorder
from hf_recycle.records.summary import summarize
from hf_recycle.trainer.muon import hidden_matrices
from hf_recycle.utils.whole_files import sync_tree, write_bytes

# Written anew, or of another width: nothing else is left behind.
_REPLACED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model*", *OPTIMIZER_FILES, *RECYCLING_FILES, LIST_FILE, "README.md", "figures"),
)

ValuesOf = Callable[[PreTrainedModel, list[FeedForward]], dict[Field, Value]]


@dataclass(frozen=True)
class ResizedCheckpoint:
    """What was done.

    Attributes:
        step: of the checkpoint.
        widths: for each block, its neurons before and now.
        difference: see `Resized`.
        parameters: of the model before and now.
        losses: before and now, in nats, if a text was given.
        forgot_best: whether the best checkpoint so far, of another width, is no longer known as such.
    """

    step: int
    widths: dict[str, tuple[int, int]]
    difference: float
    parameters: tuple[int, int]
    losses: tuple[float, float] | None
    forgot_best: bool


def resize_checkpoint(
    folder: Path,
    output: Path,
    values_of: ValuesOf,
    settings: ResizeSettings,
    evaluation: EvaluationSettings | None = None,
    ff_blocks: str | None = None,
) -> ResizedCheckpoint:
    """Writes a checkpoint of another width, which is whole or absent.

    Args:
        folder: a checkpoint of one process, DDP or FSDP2.
        output: where the new one goes; may be `folder`, which it then takes the place of.
        values_of: what the configuration is to say, of a model and its blocks.
        evaluation: a text to look at and to measure the loss on.
        ff_blocks: the part of a composite model; None: that of the run.

    Raises:
        UserError: in a sentence, what can't be done; nothing is written then.
    """
    state = _check_folder(folder)
    step = state["global_step"]
    if step_of_name(output) not in (None, step):
        raise UserError(f"output={str(output)!r} is the name of another step; this is the checkpoint of step {step}")
    content = _read_recycling_files(folder)
    arguments = {} if content is None else content.config["arguments"]
    pattern, part = arguments.get("ff_pattern"), ff_blocks or arguments.get("ff_blocks")
    source = Source(str(folder))
    model, _ = load_model(source, pattern, part)
    text = None if evaluation is None else load_language_model(source, evaluation, model)
    blocks = find_feed_forwards(model, pattern, part)
    neurons = ModelNeurons(model, blocks, seed=settings.seed) if text is None else text.neurons(blocks, settings.seed)
    saved = read_optimizer(folder)
    sizes = [sum(t.numel() * t.element_size() for t in tensors) for tensors in (_tensors(saved), model.parameters())]
    pruned, fading = _masks(blocks, {} if content is None else content.tensors)
    if settings.fold == "least_squares" and any(mask.any() for mask in fading):
        raise UserError(
            f"fold='least_squares' can't be used at step {step}, where neurons fade in, whose weights are kept twice; "
            "resize a checkpoint in which none does, or pass another fold"
        )
    resized = resize_model(
        neurons,
        values_of(model, blocks),
        settings,
        step=step,
        pruned=pruned,
        settled=[~(first | second) for first, second in zip(pruned, fading, strict=True)],
        bytes_for_one=1 + sizes[0] / max(sizes[1], 1),
    )
    optimizer = _resized_optimizer(saved, model, blocks, resized, folder)
    staging = staging_folder(output)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(*_REPLACED))
        resized.model.save_pretrained(staging)
        torch.save(optimizer, staging / PLAIN)
        if forgot_best := state.get("best_model_checkpoint") is not None:
            state |= dict.fromkeys(("best_metric", "best_global_step", "best_model_checkpoint"))
            write_bytes(staging / TRAINER_STATE_NAME, (json.dumps(state, indent=2, sort_keys=True) + "\n").encode())
        if content is not None:
            write_files(staging, _resized_files(content, blocks, resized, step))
            write_card(staging, figures=False)
        write_list(staging, step, checksum_all=False)
        sync_tree(staging)
        install(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    losses = None
    if text is not None:
        losses = text.loss(), replace(text, model=resized.model).loss()
    widths = {old.name: (old.num_neurons, new.num_neurons) for old, new in zip(blocks, resized.blocks, strict=True)}
    counts = model.num_parameters(), resized.model.num_parameters()
    return ResizedCheckpoint(step, widths, resized.difference, counts, losses, forgot_best)


def _check_folder(folder: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint that can be resized."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; name a checkpoint-N folder of a run")
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(
            f"{folder} is no checkpoint that training goes on from: it has no {TRAINER_STATE_NAME}; name a "
            "checkpoint-N folder, or make a model smaller with hf-recycle shrink"
        )
    if zero_partitions(folder) is not None:
        raise UserError(
            f"{folder} was written by DeepSpeed, which keeps the optimizer's state in partitions of its own; resize a "
            f"checkpoint of one process, DDP or FSDP2, or start a new run from its weights (hf-recycle shrink {folder})"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter of PEFT, and not the neurons of its model; merge it first")
    if not any((folder / name).exists() for name in OPTIMIZER_FILES):
        raise UserError(
            f"{folder} holds no {PLAIN}, so no training goes on from it; name one of its checkpoint-N folders, or make "
            "its model smaller with hf-recycle shrink"
        )
    check_list(folder)
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        assert type(state["global_step"]) is int
    except Exception as error:  # it may hold anything
        raise UserError(f"{folder / TRAINER_STATE_NAME} can't be read ({first_line(error)}); restore it") from error
    return state


def _read_recycling_files(folder: Path) -> FileSet | None:
    if not (folder / CONFIG_FILE).is_file():
        return None
    _, content = read_files(folder)
    if int(content.tensors.get("trainer/initial_weights", torch.zeros(1))):
        raise UserError(
            f"{folder} is of a run with l2_init_weight, whose initial weights have the width that it began with; a run "
            "that is to be resized goes without"
        )
    return content


def _masks(blocks: list[FeedForward], tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For each block, bool `(d_ff,)`: the pruned neurons, and those that fade in."""
    pruned, fading = [], []
    for block in blocks:
        mask = torch.zeros(block.num_neurons, dtype=torch.bool)
        pruned.append(tensors.get(f"{block.name}/pruned", mask))
        mask = mask.clone()
        mask[tensors.get(f"{block.name}/fade_in/index", torch.empty(0, dtype=torch.int64))] = True
        fading.append(mask)
    return pruned, fading


# ---- The optimizer ----


def _resized_optimizer(
    saved: dict[str, Any], model: PreTrainedModel, blocks: list[FeedForward], resized: Resized, folder: Path
) -> dict[str, Any]:
    """The state dict of a single process' optimizer of the new model."""
    names = _names_by_group(saved["param_groups"], model, folder)
    key_of = {name: key for group, known in zip(saved["param_groups"], names, strict=True)
              for key, name in zip(group["params"], known, strict=True)}  # fmt: skip
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs: dict[str, list] = {}
    for number, (old, new) in enumerate(zip(blocks, resized.blocks, strict=True)):
        for before, after in zip(old.slices, new.slices, strict=True):
            pairs.setdefault(name_of[id(before.parameter)], []).append((before, after, resized.kept(number)))
    order = [name for name, _ in model.named_parameters()]
    state: dict[int, Any] = {}
    groups, first = [], 0
    for group, known in zip(saved["param_groups"], names, strict=True):
        for number, name in enumerate(sorted(known, key=order.index), first):
            entries = saved["state"].get(key_of[name])
            if entries is None:
                continue
            state[number] = entries
            if name in pairs:
                slices, kept = [(a, b) for a, b, _ in pairs[name]], [index for *_, index in pairs[name]]
                try:
                    state[number] = {key: resized_entry(key, value, slices, kept) for key, value in entries.items()}
                except ValueError as error:
                    raise UserError(f"{folder} can't be resized: {error}; use an optimizer such as AdamW") from error
        groups.append({**group, "params": list(range(first, first + len(known)))})
        first += len(known)
    return {"state": state, "param_groups": groups}


def _names_by_group(groups: list[dict[str, Any]], model: PreTrainedModel, folder: Path) -> list[list[str]]:
    """The parameters of each group, in the order in which it holds them: FSDP2 names them, other engines number them as
    the Trainer hands them over."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    if any(isinstance(key, str) for group in groups for key in group["params"]):
        names = [[first.get(id(parameters.get(key)), key) for key in group["params"]] for group in groups]
    else:
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        parts = [[n for n in trained if n in decayed], [n for n in trained if n not in decayed]]
        if any("use_muon" in group for group in groups):
            hidden = {id(parameter) for parameter in hidden_matrices(model)}
            halves = [(part, is_hidden) for part in parts for is_hidden in (True, False)]
            parts = [[n for n in part if (id(trained[n]) in hidden) == is_hidden] for part, is_hidden in halves]
            parts = [part for part in parts if part]
        names = parts
    fits = [len(known) == len(group["params"]) for known, group in zip(names, groups, strict=False)]
    if len(names) != len(groups) or not all(fits) or not {name for part in names for name in part} <= parameters.keys():
        raise UserError(
            f"{folder} can't be resized: its optimizer has groups of parameters other than those of the Trainer, so "
            "which state is whose can't be told; use the Trainer's own optimizers"
        )
    return names


def _tensors(saved: dict[str, Any]) -> list[Tensor]:
    return [value for entries in saved["state"].values() for value in entries.values() if isinstance(value, Tensor)]


# ---- The recycling files ----


def _resized_files(content: FileSet, blocks: list[FeedForward], resized: Resized, step: int) -> FileSet:
    tensors = dict(content.tensors)
    phases, skipped = (int(tensors.get(f"trainer/{name}", torch.zeros(1))) for name in ("phases", "skipped_steps"))
    recorder = HistoryRecorder.from_table(content.history)
    sizes = {block.name: block.num_neurons for block in resized.blocks}
    for block, former in zip(blocks, resized.former, strict=True):
        _resize_state(tensors, block.name, former, max(phases, 1), step, skipped)
        recorder.resize(step, block.name, block.num_neurons, former.tolist(), resized.note)
    config = {
        **content.config,
        "blocks": [
            each | {"num_neurons": sizes.get(each["name"], each["num_neurons"])} for each in content.config["blocks"]
        ],
        "run": content.config.get("run", {}) | {"model": model_facts(resized.model)},
    }
    names = [each["name"] for each in config["blocks"]]
    magnitudes = dict(zip(sizes, on_cpu(magnitudes_of(resized.blocks)), strict=True))
    immunity = config["arguments"].get("recycle_immunity") or 0
    stats = summarize(
        {name: tensors[f"{name}/counts"] for name in names},
        magnitudes,
        recorder,
        step=step,
        pruned={name: tensors[key] for name in names if (key := f"{name}/pruned") in tensors},
        fading_in=sum(len(tensors[key]) for name in names if (key := f"{name}/fade_in/index") in tensors),
        immune=sum(int(is_immune(tensors[f"{name}/last_phase"], phases + 1, immunity).sum()) for name in names),
        extra=content.stats.get("extra"),
    )
    return FileSet(config, tensors, recorder.to_table(), stats)


def _resize_state(
    tensors: dict[str, Tensor], name: str, former: Tensor, phase: int, step: int, skipped_steps: int
) -> None:
    """Changes, in place, what a checkpoint knows of the neurons of one block. Those that are added were born now: they
    are as immune, and as young, as if a phase had just recycled them."""
    born = {"counts": 0, "last_phase": phase, "last_step": step, "skipped_steps": skipped_steps, "pruned": False}
    before = len(tensors[f"{name}/counts"])
    if skipped_steps:
        tensors.setdefault(f"{name}/skipped_steps", torch.zeros(before, dtype=torch.int64))
    for kind, value in born.items():
        key = f"{name}/{kind}"
        if key in tensors:
            tensors[key] = tensors[key][former].masked_fill(former < 0, value)
    for key in (f"{name}/pruned", f"{name}/skipped_steps"):
        if key in tensors and not tensors[key].any():
            del tensors[key]
    places = torch.full((before,), -1)
    places[former[former >= 0]] = (former >= 0).nonzero().flatten()
    lines = {key: tensors.pop(key) for key in [*tensors] if key.startswith(f"{name}/fade_in/")}
    if not lines:
        return
    now = places[lines[f"{name}/fade_in/index"]]
    lines[f"{name}/fade_in/index"] = now
    if (now >= 0).any():
        tensors.update({key: values[now >= 0] for key, values in lines.items()})
