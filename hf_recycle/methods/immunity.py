"""Immunity: a recycled neuron is left alone for the next phases (*Neuron Recycling*, section "Immunity")."""

from torch import Tensor


def is_immune(last_phase: Tensor, phase: int, immunity: int) -> Tensor:
    """Which neurons may not be selected in phase number `phase`.

    A neuron recycled in phase p is immune in the phases p + 1 ... p + immunity: exactly `immunity` of them.

    Args:
        last_phase: int `(d_ff,)`, the number of the phase that recycled each neuron last, 0 for never. Phases count
            from 1.

    Returns:
        bool `(d_ff,)`.
    """
    return last_phase >= max(phase - immunity, 1)
