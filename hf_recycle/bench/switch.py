"""Methods that are on at one step of a training and off at the next, to see what they add to a step.

Two processes with the same training may differ by a percent for as long as they live, by where their memory came to
lie. That is as much as a method costs; so its steps are compared with others of the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import Trainer, TrainerCallback

from hf_recycle.callbacks.magnitudes import MagnitudeCallback
from hf_recycle.callbacks.midpoint import MidpointLossCallback
from hf_recycle.callbacks.recycling import RecyclingCallback

Switch = Callable[[bool], None]


def is_on(step: int) -> bool:
    """Whether the method is on at a step, from 1: on, off, off, on, on, off, off, ..., so that of the steps (1, 2),
    (3, 4), ... each pair has one of either, and a drift of the machine favours none."""
    return step % 4 < 2


def _callback(trainer: Trainer, kind: type[TrainerCallback]) -> Switch:
    """Takes a callback off the trainer's list and puts the list back."""
    handler = trainer.callback_handler
    all_of_them = handler.callbacks
    others = [callback for callback in all_of_them if not isinstance(callback, kind)]

    def switch(on: bool) -> None:
        handler.callbacks = all_of_them if on else others

    return switch


def _smooth(trainer: Trainer) -> Switch:
    """Leaves the neurons in transition where they are for a step, as ordinary ones."""
    [callback] = (each for each in trainer.callback_handler.callbacks if isinstance(each, RecyclingCallback))

    def switch(on: bool) -> None:
        callback.smooth_steps = trainer.args.recycle_smooth_steps if on else 0

    return switch


SWITCHES: dict[str, Callable[[Trainer], Switch]] = {
    "recycling": partial(_callback, kind=RecyclingCallback),
    "smooth": _smooth,
    "midpoint": partial(_callback, kind=MidpointLossCallback),
    "magnitudes": partial(_callback, kind=MagnitudeCallback),
}
