"""The checks that the Hub makes on the YAML header of a README."""

import math
import re
from typing import Any

import yaml

_HEADER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_LICENSES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0"),
    *("lgpl-3.0", "mpl-2.0", "agpl-3.0", "openrail", "unlicense", "unknown", "other"),
}
_TASKS = {"fill-mask", "text-generation", "feature-extraction", "text-classification", "token-classification"}


def validate(content: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a README."""
    match = _HEADER.match(content)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = [*_wrong_types(data), *_not_finite(data)]
    for field in ("base_model", "datasets"):
        errors += [
            f'"{field}" with value "{name}" is not valid. Use an id of the Hub.'
            for name in _as_list(data.get(field))
            if not (isinstance(name, str) and _REPO_ID.fullmatch(name))
        ]
    errors += [f'"license" must be one of {sorted(_LICENSES)}' for name in _licenses(data) if name not in _LICENSES]
    if kind == "model" and "model-index" in data:
        errors += _wrong_model_index(data["model-index"])
    task = data.get("pipeline_tag")
    unknown_task = isinstance(task, str) and task not in _TASKS
    return errors, [f'"pipeline_tag" {task!r} is not an official task'] if unknown_task else []


def metadata(content: str) -> dict[str, Any]:
    """The metadata of a README; empty if it has none that can be read."""
    match = _HEADER.match(content)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _licenses(data: dict[str, Any]) -> list[str]:
    return [name for name in _as_list(data.get("license")) if isinstance(name, str)]


def _wrong_types(data: dict[str, Any]) -> list[str]:
    errors = []
    for field in ("license", "language", "tags", "datasets", "metrics", "base_model"):
        if not all(isinstance(item, str) for item in _as_list(data.get(field))):
            errors.append(f'"{field}" must be a string or a list of strings')
    if "tags" in data and not isinstance(data["tags"], list):
        errors.append('"tags" must be an array')
    for field in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if field in data and not isinstance(data[field], str):
            errors.append(f'"{field}" must be a string')
    return errors


def _not_finite(value: Any, where: str = "") -> list[str]:
    if isinstance(value, dict):
        return [error for key, item in value.items() for error in _not_finite(item, f"{where}.{key}")]
    if isinstance(value, list):
        return [error for item in value for error in _not_finite(item, where)]
    bad = isinstance(value, float) and not math.isfinite(value)
    return [f'"{where.lstrip(".")}" is not a finite number'] if bad else []


def _wrong_model_index(index: Any) -> list[str]:
    from huggingface_hub.repocard_data import model_index_to_eval_results

    if not isinstance(index, list) or not index:
        return ['"model-index" must be an array']
    errors = []
    for model in index:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
            return ['"model-index[0].name" is required']
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                if isinstance(metric.get("value"), bool) or metric.get("value") is None:
                    errors.append('"model-index[0].results[0].metrics[0].value" is required')
    try:
        model_index_to_eval_results(index)
    except Exception as error:
        errors.append(f'"model-index" is not valid: {type(error).__name__} {error}')
    return errors
