"""The readers of the files of a checkpoint, and a small state."""

import torch

from hf_recycle.records import files

READERS = {
    files.CONFIG_FILE: files.read_config,
    files.STATE_FILE: files.read_state,
    files.HISTORY_FILE: files.read_history,
    files.STATS_FILE: files.read_stats,
}
BLOCKS = [{"name": "a", "num_neurons": 2, "gated": False}]


def neurons(counts=(0, 2), last_phase=(0, 3), last_step=(0, 30), block="a"):
    return {
        f"{block}/counts": torch.tensor(counts, dtype=torch.int32),
        f"{block}/last_phase": torch.tensor(last_phase, dtype=torch.int32),
        f"{block}/last_step": torch.tensor(last_step, dtype=torch.int64),
    }
