"""What removed neurons did is given to the out-projection's bias, or to the neurons that stay: pure functions.

For one block with activations h, of which R are removed and K stay, and out-columns V, one row for each neuron here:
"mean" adds E[h_R] V_R to the bias; "least_squares" adds C_KK⁻¹ C_KR V_R to V_K, with the second moments C of the
activations, which is the best that a linear function of h_K can do for the block's output. (Mean: An et al. 2023,
"Fluctuation-based Adaptive Structured Pruning". Least squares: Frantar & Alistarh 2022, "Optimal Brain Compression".)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_recycle.neurons.blocks import FeedForward, NeuronSlice

FOLDED = {
    "none": "",
    "mean": "folded by mean into the bias of the out-projection",
    "least_squares": "folded by least_squares into the other neurons",
}
"""What the history notes of a fold, by its name in `registry.FOLDS`."""

DAMPING = 0.01
"""What is added to the diagonal of C, over the mean of that diagonal: dead neurons make C singular."""


def damped(cross_moment: Tensor) -> Tensor:
    """`cross_moment` `(n, n)` in float64 with its diagonal raised; the identity where all of it is zero."""
    # float64 is not to be had on every accelerator.
    where = cross_moment.device if cross_moment.device.type in ("cpu", "cuda") else "cpu"
    moments = cross_moment.to(where, copy=True).double()
    extra = DAMPING * moments.diagonal().mean()
    moments.diagonal().add_(torch.where(extra > 0, extra, 1.0))
    return moments


def mean_share(mean: Tensor, out_columns: Tensor, removed: Tensor) -> Tensor:
    """What is added to the bias, float64 `(d_model,)`.

    Args:
        mean: of the activations, `(d_ff,)`.
        out_columns: `(d_ff, d_model)`.
        removed: indices `(n,)`.
    """
    removed = removed.to(out_columns.device)
    return mean.to(out_columns.device, torch.float64)[removed] @ out_columns[removed].double()


def least_squares_shares(cross_moment: Tensor, out_columns: Tensor, removed: Tensor, kept: Tensor) -> Tensor:
    """What is added to the out-columns of neurons `kept` `(m,)`, float64 `(m, d_model)`; the rest as in `mean_share`.

    Args:
        cross_moment: `(d_ff, d_ff)`.
    """
    moments = damped(cross_moment)
    removed, kept = removed.to(moments.device), kept.to(moments.device)
    wanted = moments[kept.unsqueeze(1), removed] @ out_columns.to(moments)[removed]
    factor = torch.linalg.cholesky(moments[kept.unsqueeze(1), kept])
    return torch.cholesky_solve(wanted, factor)


@torch.no_grad()
def fold(how: str, block: FeedForward, statistics: Mapping[str, Tensor], removed: Tensor, kept: Tensor) -> list[Tensor]:
    """Gives what neurons `removed` `(n,)` of a block do to the bias, or to neurons `kept` `(m,)`. Their own weights
    stay as they are.

    Args:
        how: one of `registry.FOLDS`.
        statistics: what the fold needs of them.

    Returns:
        The tensors that were written.
    """
    if how == "none" or not len(removed) or (how == "least_squares" and not len(kept)):
        return []
    out = block.out_slice
    columns = block.out_columns()
    target: NeuronSlice | None
    if how == "mean":
        target, index = block.out_bias, torch.arange(out.width)
        assert target is not None, "see check_can_fold"
        before, share = target.storage.read_full(target, index), mean_share(statistics["mean"], columns, removed)
    else:
        target, index = out, kept
        before, share = (
            columns[kept.to(columns.device)],
            least_squares_shares(statistics["cross_moment"], columns, removed, kept),
        )
    after = (before.double().to(share.device) + share).to(before.dtype)
    target.storage.write_full(target, index, after)
    return [after]


def check_can_fold(how: str, blocks: list[FeedForward], argument: str) -> None:
    """Refuses, before training, a fold that the model has no place for.

    Raises:
        ValueError: for "mean" where an out-projection has no bias.
    """
    without = [block.name for block in blocks if block.out_bias is None]
    if how == "mean" and without:
        raise ValueError(
            f"{argument}='mean' adds to the bias of the out-projection, and that of {without[0]} has none: use "
            "'least_squares' or 'none'."
        )
