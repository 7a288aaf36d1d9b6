"""Random generators that depend on nothing but (seed, step, block, purpose).

The training run's own random stream (dropout, data order) is never touched, so a run with recycling sees the batches of
its baseline; nothing has to be saved to resume; and every process draws the same.
"""

import zlib

import numpy as np
import torch


def generator_for(seed: int, step: int, block: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("select", "reinit", ...) in one block at one optimizer step."""
    sequence = np.random.SeedSequence([seed, step, block, zlib.crc32(purpose.encode())])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))
