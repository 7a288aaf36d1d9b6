"""Runs on one engine that resume from any checkpoint, of any width, in one launch.

    variant_run.py PROCESSES ENGINE FOLDER NAME=METHOD[,SETTING=VALUE ...][:CHECKPOINT] ...

Each run writes to FOLDER/NAME and saves every four steps, if no setting says otherwise. If it is refused,
FOLDER/NAME.error gets the message of each process. The settings `d_ff` and `family` are those of the model, `measured`
writes FOLDER/NAME/measured.json: what the methods communicated and held, by event (see `Measure`); the others are
training arguments.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from engine_run import begin, run
from support.processes import run_in_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EVENTS = ("before_clipping", "before_step", "after_optimizer_step", "after_step")


class Measure(TorchDispatchMode):
    """Elements sent or received, and those of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.communicated = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.communicated += max((t.numel() for t in given), default=0)
        known = {t.untyped_storage().data_ptr() for t in given}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = (t.numel() for t in made if t.untyped_storage().data_ptr() not in known)
        self.largest = max([self.largest, *fresh])
        return out


def measure_methods() -> dict[str, dict[str, int]]:
    """From now on every event of every method is measured: `{method.event: {communicated, largest}}`, the most of all
    its calls."""
    from hf_recycle.methods.all import CALLBACKS

    measured: dict[str, dict[str, int]] = {}

    def wrap(name, event):
        @functools.wraps(event)
        def wrapped(*args, **kwargs):
            with Measure() as measure:
                event(*args, **kwargs)
            most = measured.setdefault(name, {"communicated": 0, "largest": 0})
            for key in most:
                most[key] = max(most[key], getattr(measure, key))

        return wrapped

    for cls in (callback.method_class for callback in CALLBACKS):
        for event in EVENTS:
            if event in vars(cls):
                setattr(cls, event, wrap(f"{cls.__name__}.{event}", vars(cls)[event]))
    return measured


def _value(text: str) -> int | float | str:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() else value


def main() -> None:
    engine, folder = begin()
    measured = None
    for word in sys.argv[4:]:
        name, _, what = word.partition("=")
        what, _, checkpoint = what.partition(":")
        method, *settings = what.split(",")
        texts = dict(setting.split("=") for setting in settings)
        family = texts.pop("family", None)
        overrides = {"save_steps": 4} | {key: _value(text) for key, text in texts.items()}
        if overrides.pop("measured", False):
            measured = measure_methods() if measured is None else measured
            measured.clear()
        resume = Path(checkpoint) if checkpoint else None
        try:
            trainer = run(engine, method, folder / name, resume=resume, family=family, **overrides)
        except ValueError as error:
            folder.mkdir(exist_ok=True, parents=True)
            with open(folder / f"{name}.error", "a") as file:
                file.write(f"{error}\n")
            continue
        if measured is not None and trainer.is_world_process_zero():
            (folder / name / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    sys.exit(run_in_processes(sys.argv[2], int(sys.argv[1]), main))
