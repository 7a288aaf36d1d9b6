"""`python -m benchmarks.allocations`: how much memory a step takes beyond weights and optimizer, tensor by tensor.

Counted by torch's profiler, so that neither the C library's heap nor other programs count, with and without
`recompute_activations`. The second step of a `RecyclingTrainer` on the CPU, in float32.
"""

import tempfile
from typing import Any

import datasets
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import MEDIUM, Shape
from hf_recycle import RecyclingArguments, RecyclingTrainer

BATCH, MASKED = 32, 0.15


def peak_of_step(shape: Shape, **arguments) -> int:
    """The most bytes that one step of `BATCH` sequences holds beyond what it begins with."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, shape.vocabulary, (2 * BATCH, shape.sequence), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < MASKED, ids, -100)
    peaks = []

    class Trainer(RecyclingTrainer):
        def training_step(self, *inputs, **more):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                loss = super().training_step(*inputs, **more)
            events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
            held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            peaks.append(int(torch.tensor(held).cumsum(0).max()))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": BATCH, "use_cpu": True}
        quiet: dict[str, Any] = {"disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no"}
        Trainer(
            model=shape.model(),
            args=RecyclingArguments(folder, recycle_steps=100, **settings, **quiet, **arguments),
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
        ).train()
    return peaks[-1]


if __name__ == "__main__":
    print(f"{MEDIUM.layers} layers × {MEDIUM.d_model}, {BATCH} × {MEDIUM.sequence} tokens, {MASKED:.0%} masked")
    for recompute in (False, True):
        peak = peak_of_step(MEDIUM, recompute_activations=recompute)
        print(f"recompute_activations={recompute}: {peak / 2**20:,.0f} MiB")
