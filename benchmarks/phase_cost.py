"""What a selection phase costs, against reading the feed-forward weights once, as models grow.

`python -m benchmarks.phase_cost` prints the table of docs/profile.md. Times are CPU time of the process on one
thread, because what other processes do on the machine disturbs it less than the clock on the wall.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_recycle.methods.recycling.phase import run_phase
from hf_recycle.methods.schedule import PhaseSchedule
from hf_recycle.methods.settings import RecyclingSettings
from hf_recycle.neurons.table import NeuronTable


@dataclass(frozen=True)
class Shape:
    """The feed-forward blocks of a model."""

    d_model: int
    d_ff: int
    layers: int

    @property
    def weights(self) -> int:
        """Entries of all in- and out-projections, biases left out."""
        return 2 * self.d_model * self.d_ff * self.layers

    @property
    def training_bytes(self) -> int:
        """Memory that a measurement takes: float32 weights and Adam's two moments."""
        return 3 * 4 * self.weights


SHAPES = {
    "BERT Mini": Shape(256, 1024, 4),
    "BERT Small": Shape(512, 2048, 4),
    "BERT Medium": Shape(512, 2048, 8),
    "BERT Base": Shape(768, 3072, 12),
    "BERT Large": Shape(1024, 4096, 24),
}


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one operation.

    Attributes:
        median: over the repetitions.
        low, high: the quartiles.
        samples: all of them, in the order measured.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, tuple(seconds))


@dataclass(frozen=True)
class PhaseCost:
    """What a phase costs on one shape, on one thread; operations were measured in turn, round after round.

    Attributes:
        read: reading all in- and out-projections once: `weight.sum()` of each.
        magnitudes: of all blocks, on the CPU.
        phase_keep, phase_reset: a whole selection phase at `fraction`, low magnitude, `initial`, after the first one:
            magnitudes, choice, new weights; with `recycle_optimizer_state` keep, and with reset, which also reads the
            second moments of the weights (as much memory again).
    """

    shape: Shape
    fraction: float
    repetitions: int
    read: Timing
    magnitudes: Timing
    phase_keep: Timing
    phase_reset: Timing

    def in_reads(self, operation: str) -> float:
        """The median of one of the operations over that of `read`."""
        return getattr(self, operation).median / self.read.median


class FeedForward(nn.Module):
    """A block as BERT's, without what lies around it."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(shape.d_model, shape.d_ff), nn.Linear(shape.d_ff, shape.d_model)


def phase_cost(shape: Shape, *, repetitions: int = 9, fraction: float = RecyclingSettings.fraction) -> PhaseCost:
    """Measures one shape; see `PhaseCost`.

    Args:
        repetitions: rounds, at least 2.
        fraction: share of the neurons that a phase recycles.
    """
    model = nn.Sequential(*(FeedForward(shape) for _ in range(shape.layers)))
    optimizer = _adam_with_state(model)
    table = NeuronTable.of(model)
    weights = [piece.parameter for block in table.blocks for piece in block.weight_slices]
    schedule = PhaseSchedule(every=1, start=1, end=2**31, last_step=2**31 + 1, fraction=fraction)

    def phase(optimizer_state: str) -> None:
        settings = RecyclingSettings(steps=1, fraction=fraction, seed=0, optimizer_state=optimizer_state)
        run_phase(table, settings, schedule, table.phases + 1, smooth_steps=0, optimizer=optimizer)

    @torch.no_grad()
    def read() -> None:
        for weight in weights:
            weight.sum()

    operations: dict[str, Callable[[], object]] = {
        "read": read,
        "magnitudes": table.magnitudes,
        "phase_keep": lambda: phase("keep"),
        "phase_reset": lambda: phase("reset"),
    }
    with _one_thread():
        return PhaseCost(shape, fraction, repetitions, **_interleaved(operations, repetitions))


def phase_cost_table(costs: dict[str, PhaseCost]) -> str:
    """Markdown: a row for each shape, times in milliseconds and in reads."""
    lines = [
        "| shape | weights | reading them | magnitudes | phase, `keep` | phase, `reset` |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        shape, read = cost.shape, 1e3 * cost.read.median
        cells = [f"{name}: {shape.layers} × {shape.d_model} × {shape.d_ff}", f"{shape.weights / 1e6:.1f} M"]
        cells.append(f"{read:.2f} ms ({1e3 * cost.read.low:.2f}–{1e3 * cost.read.high:.2f})")
        for operation in ("magnitudes", "phase_keep", "phase_reset"):
            cells.append(f"{cost.in_reads(operation):.1f}× ({1e3 * getattr(cost, operation).median:.1f} ms)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _adam_with_state(model: nn.Module) -> torch.optim.Optimizer:
    """An AdamW whose moments exist, as after a first step, which would take the memory of gradients too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.full_like(parameter, 1e-4, requires_grad=False),
            "exp_avg_sq": torch.full_like(parameter, 1e-8, requires_grad=False),
        }
    return optimizer


def _interleaved(operations: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Timing]:
    """Runs the operations in turn, A B C A B C …; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repetitions + 1):
        for name, operation in operations.items():
            begin = time.process_time()
            operation()
            seconds[name].append(time.process_time() - begin)
    return {name: Timing.of(values[1:]) for name, values in seconds.items()}


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    print(phase_cost_table({name: phase_cost(shape) for name, shape in SHAPES.items()}))
