"""Magnitudes of all the neurons of a model."""

import torch
from torch import Tensor, nn

from hf_recycle.neurons.blocks import magnitudes_of
from hf_recycle.neurons.find import find_feed_forwards


def neuron_magnitudes(model: nn.Module, pattern: str | None = None) -> dict[str, Tensor]:
    """The magnitude of every feed-forward neuron, `‖W_in[i]‖₂ · ‖W_out[:, i]‖₂`: `{block name: float32 (d_ff,)}`.

    One pass over the weights, on their own device, without copying them.

    Args:
        model: the unwrapped model.
        pattern: see `find_feed_forwards`.

    Raises:
        ValueError: if no block is found.
    """
    blocks = find_feed_forwards(model, pattern)
    return {block.name: values for block, values in zip(blocks, magnitudes_of(blocks), strict=True)}


def on_cpu(values: list[Tensor]) -> list[Tensor]:
    """Vectors `(n,)` on the CPU, by one transfer from each device: every transfer waits for the device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, each in enumerate(values):
        by_device.setdefault(each.device, []).append(number)
    arrived = list(values)
    for device, numbers in by_device.items():
        if device.type != "cpu":
            together = torch.cat([values[number] for number in numbers]).cpu()
            parts = together.split([len(values[number]) for number in numbers])
            for number, part in zip(numbers, parts, strict=True):
                arrived[number] = part
    return arrived
