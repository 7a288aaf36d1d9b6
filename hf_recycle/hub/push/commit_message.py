"""What the message of a commit says: step, loss and share of neurons recycled."""

import json
from pathlib import Path

from hf_recycle.records import files

# The stock Trainer's texts, which say when a push happens and nothing about the model.
_OCCASIONS = {"End of training": "End of training", "Model save": "Model saved"}


def commit_message(folder: Path, wanted: str | None = None) -> tuple[str, str]:
    """`(message, description)` for the model in a folder.

    Args:
        wanted: the user's own message, which then stands alone, with the facts in the description; or one of the
            stock Trainer's, which the facts are added to.
    """
    facts = _facts(folder)
    if wanted is None:
        return facts or "Upload model", ""
    if wanted in _OCCASIONS:
        return ", ".join(filter(None, (_OCCASIONS[wanted], facts))), ""
    return wanted, facts


def step_of(folder: Path) -> int | None:
    """The optimizer step of the model in a folder; None if nothing there tells."""
    try:
        return int(files.read_stats(folder)["step"])
    except (files.RecyclingFileError, KeyError):
        pass
    try:
        return int(json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _facts(folder: Path) -> str:
    try:
        stats = files.read_stats(folder)
    except files.RecyclingFileError:  # a model without feed-forward blocks has none
        step = step_of(folder)
        return "" if step is None else f"step {step}"
    parts = [f"step {stats['step']}"]
    for name, label in (("loss", "loss"), ("eval_loss", "eval loss")):
        last = stats["losses"].get(name, {}).get("last")
        if last is not None:
            parts.append(f"{label} {last:.4f}")
    return ", ".join([*parts, f"{100 * stats['neurons']['share_ever_recycled']:.1f}% of neurons recycled"])
