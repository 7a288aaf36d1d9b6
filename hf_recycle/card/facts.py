"""The facts that a model card and a report tell: read from a folder, put into words and tables, not yet laid out.

Everything here may come from a stranger's repository: texts are plain texts, to be escaped by whoever lays them out.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from hf_recycle.card.architectures import Task, task_of
from hf_recycle.card.escape import one_line
from hf_recycle.card.run_facts import is_repo_id
from hf_recycle.card.words import told_facts
from hf_recycle.methods.settings import METHODS, Settings
from hf_recycle.records.ceiling_file import read_ceiling
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.naming import short_names
from hf_recycle.records.recorder import LEFT_ALONE

_MAX_JSON = 64 * 2**20
_METRICS = (
    # column of the log, its name in words, the Hub's type of metric (None: not reported there)
    ("loss", "training loss (nats)", None),
    ("eval_loss", "evaluation loss (nats)", "loss"),
    ("eval_accuracy", "evaluation accuracy", "accuracy"),
)
FIGURES = {
    "loss.png": ("Loss over training", "results"),
    "recycle_counts.png": ("How many neurons were recycled how often", "recycling"),
    "ages.png": ("Optimizer steps since neurons were last recycled", "recycling"),
    "magnitudes.png": ("Neuron magnitudes over training, by block", "magnitudes"),
    "ceiling.png": ("Idle neurons by block, and the loss added by taking some away", "ceiling"),
}
"""File name -> (what it shows, part of the card it belongs to)."""

BUILT_IN_CORPUS = "built-in corpus"

Rows = list[tuple[str, ...]]


def card_facts(folder: str | os.PathLike[str], repo_id: str | None = None) -> dict[str, Any]:
    """The facts of a checkpoint or output folder, from its files alone.

    Args:
        folder: holds the recycling files; `config.json`, `trainer_state.json` and a tokenizer where there are any.
        repo_id: the repository that the folder is, or will be, published in.

    Raises:
        RecyclingFileError: a recycling file is missing or damaged.
    """
    folder = Path(folder)
    return facts_of(RecyclingHistory.of_own_run(folder), folder, repo_id)


def facts_of(history: RecyclingHistory, folder: Path, repo_id: str | None = None) -> dict[str, Any]:
    """As `card_facts`, with the history already read."""
    run = history.config.get("run", {})
    config, state = _read_json(folder / "config.json"), _read_json(folder / "trainer_state.json")
    architecture = _architecture(config, run)
    task = task_of(architecture)
    name = repo_id.split("/")[-1] if repo_id else None
    data, base = run.get("data", {}), run.get("base_model") or {}
    return {
        "repo_id": repo_id,
        "name": name or "A model trained with hf_recycle",
        "license": None,
        "language": "en" if data.get("name") == BUILT_IN_CORPUS else None,
        "more_tags": [],
        "pipeline_tag": task.pipeline,
        "widget": _widget(task, run),
        "place": repo_id or "path/to/this/folder",
        "task": task,
        "architecture": architecture,
        "parameters": run.get("model", {}).get("parameters"),
        "has_tokenizer": (folder / "tokenizer_config.json").is_file() or bool(run.get("tokenizer")),
        "step": history.stats["step"],
        "max_steps": _whole(state.get("max_steps")),
        "epoch": _number(state.get("epoch")),
        "base_model": {"name": base["name"], "revision": base.get("revision")} if "name" in base else None,
        "command": _command(run.get("command")),
        "methods": _methods(history.config["arguments"]),
        "results": _results(history),
        "evaluation": _evaluation(history),
        "data_name": data.get("name"),
        "datasets": [name for name in data.get("datasets", []) if is_repo_id(name)],
        "dataset_config": data.get("config"),
        "data_files": data.get("files", []),
        "trained_on": data.get("datasets") or data.get("files") or [name for name in [data.get("name")] if name],
        "neurons": history.stats["neurons"],
        "phases": history.stats["phases"],
        "recyclings": history.stats["recycling_events"],
        "left_alone": _left_alone(history),
        "resizes": _resizes(history),
        "probed": len(history.activity) > 0,
        "blocks": _blocks(history),
        "ceiling": _ceiling(folder),
        "changed": _listed(run.get("arguments", {})),
        "surroundings": _surroundings(run),
        "versions": _listed(run.get("versions", {})),
        "seed": run.get("arguments", {}).get("seed", run.get("defaults", {}).get("seed")),
        "unigram_entropy": run.get("unigram_entropy"),
        "figures": {},
        **told_facts(run.get("card", {})),
    }


def _widget(task: Task, run: Mapping[str, Any]) -> str | None:
    """A text to try the model on, with its mask; only for English, and for words."""
    mask = (run.get("tokenizer") or {}).get("mask")
    languages = run.get("card", {}).get("language") or ["en"]
    english = "en" in ([languages] if isinstance(languages, str) else languages)
    return f"The function returns a {mask} of strings." if mask and english and task.pipeline == "fill-mask" else None


# ---- Methods ----


def _methods(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods that were on, in the words of their settings' docstrings, with their settings."""
    methods = []
    for method in METHODS:
        settings = _settings(method, arguments)
        if settings is None or not settings.enabled:
            continue
        name, _, what = (method.__doc__ or "").split("\n")[0].partition(":")
        changed = [
            (method.prefix + item.name, _show(getattr(settings, item.name)))
            for item in fields(method)
            if item.name != "seed" and getattr(settings, item.name) != getattr(method(), item.name)
        ]
        methods.append({"name": name.strip(" ."), "what": what.strip(), "settings": changed, "prefix": method.prefix})
    return methods


def _settings(method: type[Settings], arguments: Mapping[str, Any]) -> Settings | None:
    settings = method.from_flat(arguments)
    try:
        settings.validate(method.prefix)
    except (ValueError, TypeError):  # of a newer version, or made up
        return None
    return settings


# ---- Results ----


def _results(history: RecyclingHistory) -> Rows:
    """Name, first, last and best value with their steps."""
    rows: Rows = []
    for column, name, _ in _METRICS:
        values = _finite(history, column)
        if not len(values):
            continue
        best = values[np.argmax(values[:, 1]) if column == "eval_accuracy" else np.argmin(values[:, 1])]
        rows.append((name, *(f"{value:.4f} (step {int(step):,})" for step, value in (values[0], values[-1], best))))
    return rows


def _evaluation(history: RecyclingHistory) -> list[tuple[str, str, float]]:
    """The last evaluation: (the Hub's type of the metric, its name, its value)."""
    found = []
    for column, name, kind in _METRICS:
        if kind is not None and len(values := _finite(history, column)):
            found.append((kind, name, round(float(values[-1, 1]), 6)))
            if kind == "loss" and values[-1, 1] < 30:  # past this a perplexity says nothing
                found.append(("perplexity", "evaluation perplexity", round(math.exp(values[-1, 1]), 4)))
    return found


def _finite(history: RecyclingHistory, column: str) -> np.ndarray:
    """(n, 2): steps and finite values of a logged number."""
    logs = history.logs
    if column not in logs:
        return np.zeros((0, 2))
    values = logs[["step", column]].to_numpy(dtype=float)
    return values[np.isfinite(values[:, 1])]


# ---- Neurons ----


def _blocks(history: RecyclingHistory) -> Rows:
    """A row per block: name, neurons, then (where any neuron was recycled) recycled, share, recyclings, most times,
    median age, then (where a probe looked) dead and dormant ones when it looked last, then the median magnitude."""
    names, recycled = short_names(history.blocks), history.stats["recycling_events"] > 0
    activity = history.activity.drop_duplicates("block", keep="last").set_index("block")
    rows: Rows = []
    for block in history.stats["blocks"]:
        name, size = block["name"], block["neurons"]
        row: tuple[str, ...] = (names[name], f"{size:,}")
        if recycled:
            ages = history.ages[name][history.ages[name] >= 0]
            row += (
                f"{block['ever_recycled']:,}",
                f"{100 * block['ever_recycled'] / size:.1f}%",
                f"{block['recycling_events']:,}",
                f"{int(history.counts[name].max(initial=0)):,}",
                f"{int(np.median(ages)):,}" if len(ages) else "–",
            )
        if len(activity):
            known = activity.loc[name] if name in activity.index else {}
            row += tuple(
                f"{known[kind]:,} of {known['neurons']:,}" if len(known) else "–" for kind in ("dead", "dormant")
            )
        quantiles = block.get("magnitude_quantiles") or {}
        rows.append((*row, *(f"{quantiles[q]:.3g}" if q in quantiles else "–" for q in ("0.01", "0.5", "0.99"))))
    return rows


def _resizes(history: RecyclingHistory) -> list[tuple[int, int, int]]:
    """Step, and neurons of all resized blocks before and after, of each change of width."""
    rows = history.resizes.assign(now=history.resizes["former"].map(len))
    sums = rows.groupby("step")[["neurons", "now"]].sum()
    return [(int(step), int(before), int(now)) for step, before, now in sums.itertuples()]


def _left_alone(history: RecyclingHistory) -> str | None:
    """Why the last selection phase left the model alone, if it did."""
    note = next(iter(history.events["note"][::-1]), None) or ""
    return note.removeprefix(LEFT_ALONE) if note.startswith(LEFT_ALONE) else None


def block_columns(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the columns of `facts["blocks"]`."""
    counts = ("recycled", "share", "recyclings", "most times", "median age") if facts["recyclings"] else ()
    idle = ("dead", "dormant") if facts["probed"] else ()
    return ("block", "neurons", *counts, *idle, "magnitude: 1%", "median", "99%")


def _ceiling(folder: Path) -> dict[str, Any] | None:
    """What the neurons do on a text, if that was measured: the text's name, the verdict, rows of blocks and curve."""
    found = read_ceiling(folder)
    if found is None:
        return None
    names = short_names([row["name"] for row in found["blocks"]])
    counts = ("neurons", "dead", "dormant", "duplicate")
    blocks: Rows = [
        (names[row["name"]], *(f"{row[name]:,}" for name in counts), f"{row['cost']:+z.4f} ± {row['sd']:.4f}")
        for row in found["blocks"]
    ]
    curve: Rows = [
        (
            f"{100 * row['share']:g}%",
            f"{row['loss']:.4f}",
            f"{row['cost']:+z.4f} ± {row['sd']:.4f}",
            f"{row['parameters']:,}",
            f"{100 * row['flops']:.1f}%",
        )
        for row in found["curve"]
    ]
    return {"text": found["text"], "verdict": found["verdict"], "blocks": blocks, "curve": curve}


# ---- Run ----


def _command(command: str | None) -> str | None:
    """The command, if it is one of ours, quoted so that pasting it runs nothing else and publishes nothing: whoever
    reads the card may not write to its repository."""
    try:
        words = shlex.split(one_line(command or ""))
    except ValueError:  # a quotation without its end
        return None
    kept, publishing = [], False
    for word in words:
        if word.startswith("--"):
            publishing = re.match(r"--(hub[_-]|push[_-]to[_-]hub)", word) is not None
        if not publishing:
            kept.append(word)
    return shlex.join(kept) if words[:2] == ["hf-recycle", "train"] else None


def _surroundings(run: Mapping[str, Any]) -> Rows:
    """Name and value of what the run needed."""
    hardware = run.get("hardware", {})
    rows: Rows = []
    if "device" in hardware:
        processes = hardware.get("processes", 1)
        rows.append(("Hardware", hardware["device"] if processes == 1 else f"{processes} × {hardware['device']}"))
    if "engine" in hardware:
        rows.append(("Engine", hardware["engine"]))
    if "precision" in hardware:
        rows.append(("Precision", hardware["precision"]))
    if run.get("seconds") is not None:
        rows.append(("Time", f"{duration(run['seconds'])}, with evaluations and saves"))
    if run.get("tokens"):
        rows.append(("Tokens", f"{run['tokens']:,}, padding included"))
    tokenizer = run.get("tokenizer") or {}
    if "vocabulary" in tokenizer:
        name = tokenizer.get("name") or "made for this run, or local"
        rows.append(("Tokenizer", f"{name}, {tokenizer['vocabulary']:,} entries"))
    return rows


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 12 min, 3 h 5 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def _listed(values: Mapping[str, Any]) -> Rows:
    return [(name, _show(value)) for name, value in sorted(values.items())]


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def _architecture(config: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else run.get("model", {}).get("architecture")
    return name if isinstance(name, str) and name.isidentifier() and len(name) < 200 else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside ours; empty if there is none that can be read."""
    try:
        if path.stat().st_size > _MAX_JSON:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**63 else None


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and math.isfinite(value) else None
