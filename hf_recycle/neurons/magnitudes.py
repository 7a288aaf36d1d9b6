"""Magnitudes of all the neurons of a model."""

from torch import Tensor, nn

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
    return {block.name: block.magnitudes() for block in find_feed_forwards(model, pattern)}
