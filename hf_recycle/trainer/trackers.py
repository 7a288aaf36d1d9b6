"""What trackers show of neurons: one group for all of it, and histograms, which `Trainer.log` has no place for."""

from collections.abc import Iterable
from importlib import import_module

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from hf_recycle.methods.base import Histograms

GROUP = "recycling"
"""What the names of all that is logged of neurons begin with. transformers puts `train/` before them: trackio makes a
group of each part of a name, wandb too where its workspace groups by all parts; TensorBoard by the first part alone, so
there `recycling` is a word to filter by."""


def log_histograms(callbacks: Iterable[TrainerCallback], histograms: Histograms) -> None:
    """Hands histograms to those trackers among `callbacks` that draw them, where their scalars are.

    Values that are not finite are left out. To be called on process 0, where the trackers are.
    """
    shown = {
        f"train/{GROUP}/{name}": (step, finite.numpy())
        for name, (step, values) in histograms.items()
        if len(finite := values[values.isfinite()])
    }
    if not shown:
        return
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for name, (step, values) in shown.items():
                callback.tb_writer.add_histogram(name, values, step)
        elif isinstance(callback, WandbCallback | TrackioCallback):
            tracker = import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
            drawn = {name: tracker.Histogram(values) for name, (_, values) in shown.items()}
            tracker.log({**drawn, "train/global_step": max(step for step, _ in shown.values())})
