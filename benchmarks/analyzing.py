"""The memory that `analyze` takes, on a checkpoint larger than the memory allowed to it."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.pairs import estimate
from benchmarks.row import Bench, Effort, Measured, NotMeasured, Row, Target
from hf_recycle.errors import UserError

_ROW = Row("analyze", "memory of `analyze` beyond the idle process, against the largest tensor", Target(1.0, False))


def write_checkpoint(folder: Path, d_model: int, d_ff: int, layers: int) -> int:
    """Writes the feed-forward weights of a BERT of random weights, a file for each layer; returns the bytes of the
    largest tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig

    config = BertConfig(
        hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=1, vocab_size=8
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    for layer in range(layers):
        prefix, name = f"encoder.layer.{layer}", f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        weights = {
            f"{prefix}.intermediate.dense.weight": torch.randn(d_ff, d_model),
            f"{prefix}.intermediate.dense.bias": torch.zeros(d_ff),
            f"{prefix}.output.dense.weight": torch.randn(d_model, d_ff),
        }
        save_file(weights, folder / name, {"format": "pt"})
        index |= dict.fromkeys(weights, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return 4 * d_model * d_ff


def measure_memory(small: Path, large: Path, allowed: int, link: Connection) -> None:
    """The process: analyses a large checkpoint with `allowed` bytes to allocate, and sends the peak of its memory, or
    what went wrong."""
    import resource

    from benchmarks.memory import Memory, status
    from hf_recycle.analysis.model import analyze
    from hf_recycle.analysis.source import Source

    try:
        analyze(Source(str(small)))  # what is imported and made once
        memory = Memory()
        memory.restart()
        used = status("VmData")
        assert used is not None, "limits are set on Linux only"
        limit = used + allowed
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        analyze(Source(str(large)))
        link.send(memory.peak())
    except BaseException as error:
        link.send(f"{type(error).__name__}: {error}")


def _run(effort: Effort) -> Mapping[str, Measured | NotMeasured]:
    if sys.platform != "linux":
        return {_ROW.name: NotMeasured("the memory of a process can be bounded and told on Linux only")}
    sizes = (2048, 8192, 2 if effort.quick else 8)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        write_checkpoint(small, 16, 64, 1)
        largest = write_checkpoint(large, *sizes)
        for _ in range(3):
            peaks.append(_peak(small, large, largest))
    note = f"{sizes[2]} layers × {sizes[0]}, FF weights of {2 * sizes[2]} × {largest / 2**20:.0f} MiB; at most "
    note += f"{max(peaks) / 2**20:.0f} MiB; the process was allowed to allocate {largest / 2**20:.0f} MiB"
    return {_ROW.name: Measured(estimate([peak / largest for peak in peaks]), note, {"peak bytes": peaks})}


def _peak(small: Path, large: Path, allowed: int) -> int:
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    process = context.Process(target=measure_memory, args=(small, large, allowed, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = link.recv()
    except EOFError:
        answer = "it ended without a word"
    process.join()
    if not isinstance(answer, int):
        raise UserError(f"analyze with {allowed / 2**20:.0f} MiB allowed: {answer}")
    return answer


BENCHES = (Bench((_ROW,), _run, memory=2e9),)
