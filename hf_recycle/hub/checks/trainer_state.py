"""Checks on a `trainer_state.json` of unknown origin."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainerState

_MAX_STEPS = 2**53


def trainer_state_problem(state: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a trainer's state, in a clause; None if training can go on from it."""
    known = {item.name for item in fields(TrainerState)}
    if unknown := sorted(state.keys() - known):
        return f"unknown key {unknown[0][:80]!r}"
    for name, check in _CHECKS.items():
        if name in state and not check(state[name]):
            return f"{name} is {state[name]!r:.80}"
    if missing := [name for name in _READ if name not in state]:
        return f"{missing[0]} is missing"
    if not state["global_step"] <= state["max_steps"]:
        return f"global_step is {state['global_step']} of {state['max_steps']} steps"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_STEPS


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_log(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and _is_amount(row.get("step", 0)) and _is_amount(row.get("epoch", 0)) for row in value
    )


def _is_of_callbacks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, dict) and isinstance(one.get("attributes", {}), dict) and isinstance(one.get("args", {}), dict)
        for entry in value.values()
        for one in (entry if isinstance(entry, list) else [entry])
    )


_READ = ("global_step", "max_steps", "epoch", "log_history")
_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("global_step", "max_steps", "num_input_tokens_seen"), _is_count),
    **dict.fromkeys(("total_flos", "num_train_epochs", "epoch"), _is_amount),
    **dict.fromkeys(("best_global_step", "train_batch_size"), _maybe(_is_count)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _maybe(_is_amount)),
    "best_metric": _maybe(_is_number),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), _maybe(lambda value: isinstance(value, str))),
    **dict.fromkeys(
        ("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"),
        lambda value: isinstance(value, bool),
    ),
    "log_history": _is_log,
    "stateful_callbacks": _is_of_callbacks,
}
