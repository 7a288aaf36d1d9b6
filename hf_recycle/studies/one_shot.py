"""One-shot pruning curves of a study's final models, kept beside each run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_recycle.analysis.evaluation import LanguageModel, language_model
from hf_recycle.analysis.pruning import PruneCurves, PruneSettings, measure_curve
from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.model import load_model
from hf_recycle.errors import UserError
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.records.files import write_bytes
from hf_recycle.runs.parse import parse_run
from hf_recycle.runs.run import make_collator, prepare_data
from hf_recycle.studies.results import RunResult
from hf_recycle.studies.runner import SETTINGS_FILE

CURVES_FILE = "study_prune_curves.json"
_SETTINGS = PruneSettings(
    criteria=("low_magnitude", "random", "high_magnitude"), shares=(0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
)
_SEQUENCES, _BATCH = 128, 32


def one_shot_curves(run: RunResult) -> PruneCurves:
    """Loss of a run's final model against the share of neurons pruned at once, on the first sequences of its validation
    data. Measured once.

    Raises:
        UserError: it has no validation data.
    """
    path = Path(run.folder, CURVES_FILE)
    known = _read(path)
    if known is None:
        known = _measure(run)
        write_bytes(path, json.dumps({"key": _key(), "curves": known.to_json()}, indent=1).encode())
    return known


def _measure(run: RunResult) -> PruneCurves:
    subject = _load(Path(run.folder))
    blocks = find_feed_forwards(subject.model)
    losses = {name: measure_curve(subject, blocks, name, _SETTINGS) for name in _SETTINGS.criteria}
    return PruneCurves(run.arm, subject.task.name, subject.tokens, _SETTINGS.shares, losses)


def _load(folder: Path) -> LanguageModel:
    arguments = parse_run([str(folder / SETTINGS_FILE)])
    tokenizer, _, validation = prepare_data(arguments.model, arguments.data)
    if validation is None:
        raise UserError(f"{folder} has no validation data to measure pruning on")
    saved = ModelArguments(model_name_or_path=str(folder), task=arguments.model.task)
    model = load_model(saved, tokenizer, arguments.data.max_seq_length)
    collator = make_collator(arguments, tokenizer)
    rows = [validation[index] for index in range(min(_SEQUENCES, len(validation)))]
    return language_model(model, TASKS[arguments.model.task], rows, collator, _BATCH)


def _key() -> list[Any]:
    return [list(_SETTINGS.criteria), list(_SETTINGS.shares), _SETTINGS.seed, _SEQUENCES]


def _read(path: Path) -> PruneCurves | None:
    """What was measured before, with the same settings; None if that is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != _key():
            return None
        found = content["curves"]
        return PruneCurves(found["model"], found["task"], found["tokens"], tuple(found["shares"]), found["losses"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
