"""The numbers of docs/scaling.md, from its formulas.

`python docs/scaling_numbers.py docs/scaling.md` renews the tables of that page.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import renew_between


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward blocks and grouped key-value heads (the Llama family), without biases."""

    title: str
    layers: int
    d_model: int
    d_ff: int
    key_value_width: int
    vocabulary: int
    tied: bool
    in_rows: int = 2

    @property
    def neurons(self) -> int:
        return self.layers * self.d_ff

    @property
    def neuron_weights(self) -> int:
        """Weights of one neuron: its in-rows and its out-column."""
        return (self.in_rows + 1) * self.d_model

    @property
    def ff_weights(self) -> int:
        return self.neurons * self.neuron_weights

    @property
    def parameters(self) -> int:
        attention = 2 * self.d_model * (self.d_model + self.key_value_width)
        norms = (2 * self.layers + 1) * self.d_model
        embeddings = self.vocabulary * self.d_model * (1 if self.tied else 2)
        return self.ff_weights + self.layers * attention + norms + embeddings


MODELS = (
    Shape("1 B", 16, 2048, 8192, 512, 128_256, tied=True),
    Shape("70 B", 80, 8192, 28_672, 1024, 128_256, tied=False),
)
PROCESSES = {"1 B": 8, "70 B": 128}
FRACTIONS = (0.01, 0.1)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def shapes() -> str:
    lines = ["| | " + " | ".join(m.title for m in MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    rows = {
        "parameters N": lambda m: f"{m.parameters:,}",
        "layers L, d_model d, d_ff": lambda m: f"{m.layers}, {m.d_model}, {m.d_ff}",
        "neurons L · d_ff": lambda m: f"{m.neurons:,}",
        "weights of a neuron w = 3d": lambda m: f"{m.neuron_weights:,}",
        "FF weights F = L · d_ff · w": lambda m: f"{m.ff_weights:,}",
        "processes P": lambda m: str(PROCESSES[m.title]),
    }
    return "\n".join(lines + [f"| {name} | " + " | ".join(map(value, MODELS)) + " |" for name, value in rows.items()])


def memory() -> str:
    def row(what, formula, value):
        return f"| {what} | {formula} | " + " | ".join(size(value(m, PROCESSES[m.title])) for m in MODELS) + " |"

    lines = [
        "| per process | bytes | " + " | ".join(m.title for m in MODELS) + " |",
        "|---|---|" + "---|" * len(MODELS),
    ]
    lines += [
        row("engine: DDP, float32", "16 N", lambda m, p: 16 * m.parameters),
        row("engine: ZeRO-1, bf16", "4 N + 12 N / P", lambda m, p: (4 + 12 / p) * m.parameters),
        row("engine: ZeRO-2, bf16", "2 N + 14 N / P", lambda m, p: (2 + 14 / p) * m.parameters),
        row("engine: FSDP2, ZeRO-3", "16 N / P", lambda m, p: 16 * m.parameters / p),
        row("ours, at the start: a fresh block to learn its initial distribution from", "4 · d_ff · w", _fresh_block),
        row("ours, always: state of every neuron", "25 · L · d_ff", lambda m, p: 25 * m.neurons),
        row("ours, in a phase: magnitudes, masks", "5 · L · d_ff", lambda m, p: 5 * m.neurons),
    ]
    for f in FRACTIONS:
        lines += [
            row(
                f"ours, in a phase, f = {f}: new weights of one block",
                "4 · f · d_ff · w",
                lambda m, p, f=f: 4 * f * m.d_ff * m.neuron_weights,
            ),
            row(f"smooth, f = {f}: DDP", "8 · f · F", lambda m, p, f=f: 8 * f * m.ff_weights),
            row(f"smooth, f = {f}: FSDP2, ZeRO", "8 · f · F / P", lambda m, p, f=f: 8 * f * m.ff_weights / p),
            row(
                f"smooth, f = {f}: while a checkpoint is written or read in mid-fade-in",
                "8 · f · F",
                lambda m, p, f=f: 8 * f * m.ff_weights,
            ),
        ]
    return "\n".join(lines)


def _fresh_block(model: Shape, processes: int) -> float:
    return 4 * model.d_ff * model.neuron_weights


def communication() -> str:
    def row(what, formula, value):
        return f"| {what} | {formula} | " + " | ".join(size(4 * value(m)) for m in MODELS) + " |"

    lines = ["| | elements | " + " | ".join(m.title for m in MODELS) + " |", "|---|---|" + "---|" * len(MODELS)]
    lines += [
        row("magnitudes once (phase, log, checkpoint; midpoint: every step)", "3 · L · d_ff", lambda m: 3 * m.neurons)
    ]
    lines += [
        row(f"recycled weights, f = {f} (where the next table says so)", "f · F", lambda m, f=f: f * m.ff_weights)
        for f in FRACTIONS
    ]
    lines += [row("for comparison: the engine's gradients, every step", "N", lambda m: m.parameters)]
    return "\n".join(lines)


def renew(text: str) -> str:
    """`text` with its tables renewed."""
    for table in (shapes, memory, communication):
        text = renew_between(text, table.__name__, table())
    return text


if __name__ == "__main__":
    for page in sys.argv[1:]:
        Path(page).write_text(renew(Path(page).read_text(encoding="utf-8")), encoding="utf-8")
