"""What a recycling file must contain: checks on content that was parsed and is not yet trusted.

The functions take the path only to name it. They return nothing and raise `RecyclingFileError`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from hf_recycle.errors import UserError
from hf_recycle.records.run_schema import run_problem

FORMAT_VERSION = 2
"""Version of the four files' layout. Raised only when an older package could misread them."""

MAX_NAME = 1000
"""Longest name of a block or a metric, in characters."""

NEURON_TENSORS = {"counts": torch.int32, "last_phase": torch.int32, "last_step": torch.int64}
"""The per-neuron tensors of the state file, all of shape (d_ff,) and non-negative."""

OPTIONAL_TENSORS = {"skipped_steps": torch.int64, "pruned": torch.bool}
"""Those that are there only where a neuron has something to say."""

_REMEDY = "restore the file from where it was written, or use another checkpoint"


class RecyclingFileError(UserError):
    """A recycling file is missing, damaged or contradicts another; the message says what to do."""


def fail(path: Path | str, problem: str, remedy: str = _REMEDY) -> NoReturn:
    """Raise a `RecyclingFileError` in one sentence."""
    raise RecyclingFileError(f"{path}: {problem}; {remedy}")


def check_version(path: Path, version: Any, written_by: Any) -> None:
    """Refuse a format this package does not know. `written_by` is the package's version then."""
    if not _is_count(version) or version < 1:
        fail(path, f"format_version is {_show(version)} where a whole number from 1 is expected")
    if version != FORMAT_VERSION:
        known = isinstance(written_by, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+!-]{0,39}", written_by)
        writer = f"hf_recycle {written_by}" if known else f"{'a newer' if version > FORMAT_VERSION else 'an older'} one"
        fail(
            path,
            f"it has format {version} and this hf_recycle reads format {FORMAT_VERSION}",
            f"read it with {writer}, or train anew",
        )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check `recycling_config.json`: versions, flat arguments, FF blocks with unique names."""
    check_version(path, config.get("format_version"), config.get("package_version"))
    if not isinstance(config.get("package_version"), str):
        fail(path, f"package_version is {_show(config.get('package_version'))} where text is expected")
    arguments = config.get("arguments")
    if not isinstance(arguments, dict):
        fail(path, f"arguments is {_show(arguments)} where an object is expected")
    for field, value in arguments.items():
        items = value if isinstance(value, list) else [value]
        if not all(item is None or isinstance(item, str | int | float) for item in items):
            fail(path, f"argument {field} is {_show(value)} where a number, text or a flat list is expected")
    check_blocks(path, config.get("blocks"))
    sums = config.get("checksums", {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        fail(path, f"checksums is {_show(sums)} where an object of texts is expected")
    training = config.get("training", {})
    if not isinstance(training, dict) or not all(
        (isinstance(value, str) and len(value) <= MAX_NAME) or value is None or isinstance(value, int | float)
        for value in training.values()
    ):
        fail(path, f"training is {_show(training)} where an object of numbers and texts is expected")
    if "run" in config and (problem := run_problem(config["run"])):
        fail(path, problem)


def check_blocks(path: Path, blocks: Any) -> None:
    """Check the list of FF blocks of a config."""
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        fail(path, f"blocks is {_show(blocks)} where a list of objects is expected")
    names = [block.get("name") for block in blocks]
    for block, name in zip(blocks, names, strict=True):
        if not isinstance(name, str) or len(name) > MAX_NAME or "/" in name:
            fail(path, f"{_show(name)} is no name of a block (a dotted path without a slash)")
        size = block.get("num_neurons")
        if not _is_count(size) or not 0 < size < 2**31:
            fail(path, f"num_neurons of block {name} is {_show(size)} where a number from 1 is expected")
        if not isinstance(block.get("gated"), bool):
            fail(path, f"gated of block {name} is {_show(block.get('gated'))} where true or false is expected")
    if len(set(names)) < len(names):
        fail(path, "two blocks have the same name")


def check_state(
    path: Path, tensors: Mapping[str, torch.Tensor], blocks: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Check the tensors of `recycling_state.safetensors`, against the config's blocks where they are given.

    `{block}/fade_in/...` and `trainer/...` are left to those who wrote them.
    """
    found: dict[str, set[str]] = {}
    for key in tensors:
        owner, _, rest = key.partition("/")
        if key.startswith("trainer/"):
            continue
        if rest in NEURON_TENSORS or rest in OPTIONAL_TENSORS:
            found.setdefault(owner, set()).add(rest)
        elif rest.startswith("fade_in/"):
            found.setdefault(owner, set())
        else:
            fail(path, f"it holds an unknown tensor {_show(key)}")
    sizes = None if blocks is None else {block["name"]: block["num_neurons"] for block in blocks}
    if sizes is not None and set(found) != set(sizes):
        name = sorted(set(found) ^ set(sizes))[0]
        where = "the state but not the config" if name in found else "the config but not the state"
        fail(path, f"block {name} is in {where}")
    for name, kinds in found.items():
        missing = sorted(NEURON_TENSORS.keys() - kinds)
        if missing:
            fail(path, f"{missing[0]} of block {name} is missing")
        size = tensors[f"{name}/counts"].numel() if sizes is None else sizes[name]
        _check_neurons(path, name, {kind: tensors[f"{name}/{kind}"] for kind in sorted(kinds)}, size)


def _check_neurons(path: Path, block: str, tensors: Mapping[str, torch.Tensor], size: int) -> None:
    for kind, tensor in tensors.items():
        expected = (NEURON_TENSORS | OPTIONAL_TENSORS)[kind]
        if tensor.dtype != expected:
            fail(path, f"{kind} of block {block} is {tensor.dtype} where {expected} is expected")
        if tuple(tensor.shape) != (size,):
            fail(path, f"{kind} of block {block} has shape {tuple(tensor.shape)} where ({size},) is expected")
        if bool((tensor < 0).any()):
            fail(path, f"{kind} of block {block} has negative entries")
    counts, phase, step = (tensors[kind] for kind in NEURON_TENSORS)  # these three are always there
    # A neuron is recycled at most once in a phase, so its count can't pass the number of its last phase. One that a
    # resize has added has a phase and a step and was never recycled.
    if bool((counts > phase).any()):
        fail(path, f"counts and last_phase of block {block} contradict each other")
    if bool(((phase > 0) != (step > 0)).any()):
        fail(path, f"last_phase and last_step of block {block} contradict each other")
    if bool((tensors.get("skipped_steps", step) > step).any()):
        fail(path, f"skipped_steps of block {block} are more than there were")


def check_stats(path: Path, stats: Mapping[str, Any]) -> None:
    """Check `recycling_stats.json`: versions, types, and that its totals add up."""
    check_version(path, stats.get("format_version"), stats.get("package_version"))
    neurons, blocks = stats.get("neurons"), stats.get("blocks")
    if not isinstance(neurons, dict) or not isinstance(stats.get("losses"), dict):
        fail(path, "neurons and losses must both be objects")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        fail(path, f"blocks is {_show(blocks)} where a list of objects is expected")
    for owner, keys in (
        (stats, ("step", "phases", "recycling_events")),
        (neurons, ("total", "ever_recycled", "pruned", "fading_in", "immune")),
        *((block, ("neurons", "ever_recycled", "pruned", "recycling_events")) for block in blocks),
    ):
        for key in keys:
            if not _is_count(owner.get(key)):
                fail(path, f"{key} is {_show(owner.get(key))} where a whole number from 0 is expected")
    overtraining = stats.get("overtraining", {})
    if not isinstance(overtraining, dict) or not all(map(_is_count, overtraining.values())):
        fail(path, f"overtraining is {_show(overtraining)} where an object of whole numbers is expected")
    for block in blocks:
        if not isinstance(block.get("name"), str):
            fail(path, f"{_show(block.get('name'))} is no name of a block")
        _check_quantiles(path, block)
        _check_times(path, f"block {block['name']}", block, block["neurons"])
    _check_times(path, "all blocks", {**stats, **neurons}, neurons["total"])
    for whole, part, total in (
        ("neurons.total", "neurons", neurons["total"]),
        ("neurons.ever_recycled", "ever_recycled", neurons["ever_recycled"]),
        ("neurons.pruned", "pruned", neurons["pruned"]),
        ("recycling_events", "recycling_events", stats["recycling_events"]),
    ):
        if sum(block[part] for block in blocks) != total:
            fail(path, f"{whole} is not the sum of {part} over the blocks")


def _check_times(path: Path, where: str, owner: Mapping[str, Any], total: int) -> None:
    times = owner.get("times_recycled")
    if not isinstance(times, dict) or not all(
        re.fullmatch(r"0|[1-9][0-9]{0,9}", key) and _is_count(value) for key, value in times.items()
    ):
        fail(path, f"times_recycled of {where} is {_show(times)} where {{times: neurons}} is expected")
    recycled = sum(number for key, number in times.items() if key != "0")
    events = sum(int(key) * number for key, number in times.items())
    if (sum(times.values()), recycled, events) != (total, owner["ever_recycled"], owner["recycling_events"]):
        fail(path, f"times_recycled of {where} does not add up to its number of neurons and recyclings")


def _check_quantiles(path: Path, block: Mapping[str, Any]) -> None:
    quantiles = block.get("magnitude_quantiles")
    if quantiles is not None and not (
        isinstance(quantiles, dict) and all(type(value) in (int, float) for value in quantiles.values())
    ):
        fail(path, f"magnitude_quantiles of block {block['name']} is {_show(quantiles)}")


def _is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 0 (bool is an int to Python, not to us)."""
    return type(value) is int and value >= 0


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
