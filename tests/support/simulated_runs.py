"""A simulated run: plausible records, state and summary of a few blocks, without any training."""

from pathlib import Path

import numpy as np
import torch

from hf_recycle.records import files
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import BlockRecord, HistoryRecorder
from hf_recycle.records.summary import summarize


def write_run(
    folder: Path,
    blocks: tuple[str, ...] = ("encoder.layer.0", "encoder.layer.1"),
    d_ff: int = 40,
    phases: int = 3,
    magnitudes: bool = True,
    losses: bool = True,
    every: int = 10,
    favourites: bool = True,
) -> RecyclingHistory:
    """Write the four files of a run that recycled a tenth of each block every `every` steps.

    With `favourites` it is nearly always the same tenth (the vicious cycle), else a random one.
    """
    rng = np.random.default_rng(0)
    recorder = HistoryRecorder()
    state = {
        name: {
            "counts": torch.zeros(d_ff, dtype=torch.int32),
            "last_phase": torch.zeros(d_ff, dtype=torch.int32),
            "last_step": torch.zeros(d_ff, dtype=torch.int64),
        }
        for name in blocks
    }
    values = {name: np.abs(rng.normal(0.4, 0.05, d_ff)) for name in blocks}
    last = every * (phases + 1)
    for phase in range(phases + 2):
        step = every * phase
        for name in blocks:
            if 1 <= phase <= phases:
                k = max(1, d_ff // 10)
                chosen = np.argsort(values[name])[:k] if favourites else rng.permutation(d_ff)[:k]
                recorder.phase(BlockRecord(step, name, k, d_ff, chosen.tolist(), phase=phase))
                values[name][chosen] = np.abs(rng.normal(0.3, 0.02, k))
                state[name]["counts"][chosen] += 1
                state[name]["last_phase"][chosen] = phase
                state[name]["last_step"][chosen] = step
            if magnitudes:
                recorder.magnitudes(step, name, torch.tensor(values[name]))
            values[name] = values[name] + 0.1 * rng.random(d_ff)
        if losses and step:
            recorder.log(step, {"loss": 2 + 6 * np.exp(-step / last), "learning_rate": 1e-3})
            recorder.log(step, {"eval_loss": 2 + 5 * np.exp(-step / last), "eval_accuracy": 0.4 * step / last})
    config = {
        "arguments": {"recycle_fraction": 0.1, "recycle_layers": [0, 1], "recycle_steps": every},
        "blocks": [{"name": name, "num_neurons": d_ff, "gated": False} for name in blocks],
    }
    counts = {name: tensors["counts"] for name, tensors in state.items()}
    now = {name: torch.tensor(array) for name, array in values.items()}
    files.write_config(folder, config)
    files.write_state(
        folder,
        {f"{name}/{kind}": tensor for name, tensors in state.items() for kind, tensor in tensors.items()},
    )
    files.write_history(folder, recorder.to_table())
    files.write_stats(folder, summarize(counts, now, recorder, step=last))
    return RecyclingHistory.of_own_run(folder)
