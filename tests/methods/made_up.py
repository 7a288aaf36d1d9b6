"""Statistics of a block that nobody has measured, for tests of what is done with them."""

import torch


def statistics(d_ff: int, d_model: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """All that a probe can gather, such as a block of that size might have."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(4 * d_ff, d_ff, generator=generator, dtype=torch.float64).relu()
    h = h * torch.rand(d_ff, generator=generator)  # some are more active than others
    return {
        "mean": h.mean(0),
        "mean_abs": h.abs().mean(0),
        "second_moment": h.square().mean(0),
        "cross_moment": (h.T @ h / len(h)).float(),
        "taylor": torch.rand(d_ff, generator=generator, dtype=torch.float64),
        "in_gradient": torch.rand(d_ff, generator=generator, dtype=torch.float64),
        "descent": torch.randn(d_model, d_model, generator=generator),
        "token_inputs": torch.randn(d_model, d_model, generator=generator),
    }
