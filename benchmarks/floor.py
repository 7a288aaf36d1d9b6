"""What a step of masked language modelling can't do without: matrix products and memory traffic.

Counted on paper, from shapes alone. `python -m benchmarks.floor` prints the tables of docs/floor.md;
`python -m benchmarks.floor docs/floor.md` renews them there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import renew_between

FLOAT32 = 4
"""Bytes of a master weight, of its gradient and of each of its moments, whatever the precision of the products."""

_HEAD = ("head transform", "decoder")


@dataclass(frozen=True)
class Step:
    """One training step of an encoder whose head has a transform layer and a decoder tied to the embeddings.

    Attributes:
        masked_share: share of the tokens that are predicted.
        gated: whether the FF is gated, so that a neuron has two in-rows.

    Raises:
        ValueError: for a size below 1 or a share that is not in (0, 1].
    """

    layers: int
    d_model: int
    d_ff: int
    vocabulary: int
    batch: int
    sequence: int
    masked_share: float = 0.15
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "d_ff", "vocabulary", "batch", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number of at least 1")
        if not 0 < self.masked_share <= 1:
            raise ValueError(f"masked_share={self.masked_share}: give a share above 0, at most 1")

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def masked_tokens(self) -> int:
        """The expected number, rounded."""
        return round(self.tokens * self.masked_share)

    def head_tokens(self, masked_head: bool) -> int:
        """How many tokens the head computes: the masked ones, or all."""
        return self.masked_tokens if masked_head else self.tokens

    def feed_forward_tokens(self, masked_head: bool) -> int:
        """How many tokens the feed-forward blocks compute, summed over layers: with the masked head the last layer's
        has no need of the others either."""
        return (self.layers - 1) * self.tokens + self.head_tokens(masked_head)


def matrix_weights(step: Step) -> dict[str, int]:
    """Entries of the weight matrices of each part. Biases, norms and position embeddings are left out."""
    d, d_ff = step.d_model, step.d_ff
    return {
        "attention projections": step.layers * 4 * d * d,
        "feed-forward": step.layers * (3 if step.gated else 2) * d * d_ff,
        "head transform": d * d,
        "decoder": step.vocabulary * d,
    }


def matrix_product_flops(step: Step, *, masked_head: bool) -> dict[str, int]:
    """Floating-point operations of the matrix products of each part, forward and backward.

    A multiplication and an addition are two. The forward pass is a third of them: for each of its products the backward
    pass has two of the same size, the gradients of both factors.
    """
    head, scores = step.head_tokens(masked_head), step.layers * 2 * step.sequence * step.d_model
    tokens = dict.fromkeys(_HEAD, head)
    flops = {part: 6 * tokens.get(part, step.tokens) * count for part, count in matrix_weights(step).items()}
    one_block = matrix_weights(step)["feed-forward"] // step.layers
    flops["feed-forward"] = 6 * step.feed_forward_tokens(masked_head) * one_block
    return {"attention scores and values": 6 * step.tokens * scores, **flops}


def stored_activations(step: Step, *, masked_head: bool) -> int:
    """The fewest numbers that the forward pass must keep for the backward pass, logits left out.

    In a layer: what enters the attention projections, queries, keys and values, what enters the output projection, what
    enters the FF, and its hidden values (two of each neuron when gated). In the head: what enters it, and its hidden
    values. The rest follows from these position by position, attention probabilities from queries and keys.
    """
    attention = step.tokens * step.layers * 5 * step.d_model
    feed_forward = step.feed_forward_tokens(masked_head) * (step.d_model + (2 if step.gated else 1) * step.d_ff)
    return attention + feed_forward + step.head_tokens(masked_head) * 2 * step.d_model


def product_bytes(step: Step, *, masked_head: bool, element_size: int = FLOAT32) -> dict[str, int]:
    """Least memory traffic, in bytes, of the matrix products themselves.

    Args:
        element_size: bytes of a number that enters or leaves a product: 2 under autocast.
    """
    weights = sum(matrix_weights(step).values())
    logits = step.head_tokens(masked_head) * step.vocabulary
    return {
        "weights read, forward": element_size * weights,
        "weights read, backward": element_size * weights,
        "gradients of weights written": FLOAT32 * weights,
        "activations written, then read": 2 * element_size * stored_activations(step, masked_head=masked_head),
        "logits written, their gradient read": 2 * element_size * logits,
    }


def pass_bytes(step: Step, *, masked_head: bool, element_size: int = FLOAT32) -> dict[str, int]:
    """Least memory traffic, in bytes, of what runs between the matrix products. Arguments as for `product_bytes`.

    AdamW reads weights, gradients and both moments, and writes weights and moments.
    """
    logits = step.head_tokens(masked_head) * step.vocabulary
    return {
        "loss: logits read, their gradient written": 2 * element_size * logits,
        "AdamW": 7 * FLOAT32 * sum(matrix_weights(step).values()),
    }


def memory_traffic(step: Step, *, masked_head: bool, element_size: int = FLOAT32) -> dict[str, int]:
    """Least memory traffic of the step, in bytes: `product_bytes` and `pass_bytes`."""
    products = product_bytes(step, masked_head=masked_head, element_size=element_size)
    return products | pass_bytes(step, masked_head=masked_head, element_size=element_size)


STEPS = {
    "BERT Medium": Step(layers=8, d_model=512, d_ff=2048, vocabulary=30_522, batch=16, sequence=128),
    "4 layers × 256": Step(layers=4, d_model=256, d_ff=1024, vocabulary=30_522, batch=16, sequence=128),
}
"""The steps of the page, by title."""


def floor_tables() -> str:
    """Markdown: the shapes, a table of operations and one of bytes, for each of `STEPS` with either head."""
    shapes = [
        f"* {title}: {step.layers} layers, d_model {step.d_model}, d_ff {step.d_ff}, vocabulary {step.vocabulary:,}, "
        f"batch {step.batch} × {step.sequence} tokens, {step.masked_tokens} of {step.tokens:,} masked"
        for title, step in STEPS.items()
    ]
    operations = _table("GFLOP in matrix products, forward and backward", matrix_product_flops, 1e9)
    traffic = _table("MB read or written, float32", memory_traffic, 1e6)
    return "\n".join([*shapes, "", *operations, "", *traffic])


def _table(what: str, count: Callable[..., dict[str, int]], unit: float) -> list[str]:
    columns = [count(step, masked_head=masked) for step in STEPS.values() for masked in (False, True)]
    titles = [f"{title}, {head}" for title in STEPS for head in ("full head", "masked head")]
    totals = [sum(column.values()) for column in columns]
    ratios = [f"{full / masked:.2f}" for full, masked in zip(totals[::2], totals[1::2], strict=True)]
    rows = [[part, *(f"{column[part] / unit:,.1f}" for column in columns)] for part in columns[0]]
    rows.append(["all", *(f"{total / unit:,.1f}" for total in totals)])
    rows.append(["full / masked", *(cell for ratio in ratios for cell in ("", ratio))])
    header = [what, *titles]
    return [f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * len(titles)], *rows)]


def renew(text: str) -> str:
    """`text` with its tables renewed."""
    return renew_between(text, "floor", floor_tables())


if __name__ == "__main__":
    if not sys.argv[1:]:
        print(floor_tables())
    for page in sys.argv[1:]:
        Path(page).write_text(renew(Path(page).read_text(encoding="utf-8")), encoding="utf-8")
