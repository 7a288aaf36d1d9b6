"""Methods that are on at one step of a training and off at the next, to see what they add to a step.

Two processes with the same training may differ by a percent for as long as they live, by where their memory came to
lie. That is as much as a method costs; so its steps are compared with others of the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hf_recycle.methods.base import Method
from hf_recycle.methods.magnitudes import Magnitudes
from hf_recycle.methods.midpoint import Midpoint
from hf_recycle.methods.recycling.callback import Recycling
from hf_recycle.trainer.trainer import RecyclingTrainer

Switch = Callable[[bool], None]


def is_on(step: int) -> bool:
    """Whether the method is on at a step, from 1: on, off, off, on, on, off, off, ..., so that of the steps (1, 2),
    (3, 4), ... each pair has one of either, and a drift of the machine favours none."""
    return step % 4 < 2


def _method(trainer: RecyclingTrainer, kind: type[Method]) -> Switch:
    """Takes a method off the coordinator's list, which a training makes when it begins, and puts the list back."""
    coordinator = trainer.neuron_methods
    whole: list[Method] = []

    def switch(on: bool) -> None:
        if not whole:
            whole.extend(coordinator.methods)
        coordinator.methods = [method for method in whole if on or not isinstance(method, kind)]

    return switch


def _smooth(trainer: RecyclingTrainer) -> Switch:
    """Leaves the neurons that fade in where they are for a step, as ordinary ones."""

    def switch(on: bool) -> None:
        assert trainer.recycling is not None, "the contestant recycles"
        trainer.recycling.smooth_steps = trainer.args.recycle_smooth_steps if on else 0

    return switch


SWITCHES: dict[str, Callable[[RecyclingTrainer], Switch]] = {
    "recycling": partial(_method, kind=Recycling),
    "smooth": _smooth,
    "midpoint": partial(_method, kind=Midpoint),
    "magnitudes": partial(_method, kind=Magnitudes),
    **dict.fromkeys(("probe", "probe-gradients", "obs"), partial(_method, kind=Recycling)),
}
