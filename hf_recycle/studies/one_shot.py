"""What a study measures of its final models: one-shot pruning curves, kept beside each run, and dead neurons."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_recycle.analysis.evaluation import LanguageModel, language_model
from hf_recycle.analysis.pruning import PruneCurves, PruneSettings, measure_curve
from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.model import load_model
from hf_recycle.errors import UserError
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.runs.parse import parse_run
from hf_recycle.runs.run import make_collator, prepare_data
from hf_recycle.studies.plan import Removal
from hf_recycle.studies.results import RunResult
from hf_recycle.studies.runner import SETTINGS_FILE
from hf_recycle.utils.whole_files import write_bytes

CURVES_FILE, REMOVAL_FILE = "study_prune_curves.json", "study_removal.json"
_CURVES = Removal(
    arm="",
    criteria=("low_magnitude", "random", "high_magnitude"),
    shares=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0),
)
_SEQUENCES, _BATCH = 128, 32


def one_shot_curves(run: RunResult) -> PruneCurves:
    """Loss of a run's final model against the share of neurons pruned at once, on the first sequences of its validation
    data. Measured once.

    Raises:
        UserError: it has no validation data.
    """
    return _measured(run, _CURVES, CURVES_FILE)


def removal_curves(run: RunResult, removal: Removal) -> PruneCurves:
    """The same for the shares, criteria and folds of a study, which are named "obs, least_squares"."""
    return _measured(run, removal, REMOVAL_FILE)


def dead_share(run: RunResult) -> float:
    """The share of the neurons of a run's final model that are zero on all of the data that the curves look at.

    Raises:
        UserError: it has no validation data.
    """
    subject = _load(Path(run.folder))
    found = subject.neurons(find_feed_forwards(subject.model)).statistics({"mean_abs": "dead_share"})
    return float((torch.cat([statistics["mean_abs"] for statistics in found]) == 0).float().mean())


def _measured(run: RunResult, removal: Removal, file: str) -> PruneCurves:
    path, key = Path(run.folder, file), json.loads(json.dumps([asdict(removal) | {"arm": None}, _SEQUENCES]))
    known = _read(path, key)
    if known is None:
        known = _measure(run, removal)
        write_bytes(path, json.dumps({"key": key, "curves": known.to_json()}, indent=1).encode())
    return known


def _measure(run: RunResult, removal: Removal) -> PruneCurves:
    subject, shares = _load(Path(run.folder)), (0.0, *removal.shares)
    blocks = find_feed_forwards(subject.model)
    losses = {}
    for criterion in removal.criteria:
        for fold in removal.folds:
            name = criterion if removal.folds == ("none",) else f"{criterion}, {fold}"
            losses[name] = measure_curve(subject, blocks, criterion, PruneSettings(shares=shares, fold=fold))
    return PruneCurves(run.arm, subject.task.name, subject.tokens, shares, losses)


def _load(folder: Path) -> LanguageModel:
    arguments = parse_run([str(folder / SETTINGS_FILE)])
    tokenizer, _, validation = prepare_data(arguments.model, arguments.data)
    if validation is None:
        raise UserError(f"{folder} has no validation data to measure pruning on")
    saved = ModelArguments(model_name_or_path=str(folder), task=arguments.model.task)
    model = load_model(saved, tokenizer, arguments.data.max_seq_length)
    collator = make_collator(arguments, tokenizer)
    # All facts, which were trained on too; of a text some sequences to measure on, and others to look at.
    measured = len(validation) if arguments.data.are_facts else min(_SEQUENCES, len(validation))
    rows = [validation[index] for index in range(min(2 * measured, len(validation)))]
    return language_model(model, TASKS[arguments.model.task], rows[:measured], collator, _BATCH, rows[measured:])


def _read(path: Path, key: Any) -> PruneCurves | None:
    """What was measured before, with the same settings; None if that is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        found = content["curves"]
        return PruneCurves(found["model"], found["task"], found["tokens"], tuple(found["shares"]), found["losses"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
