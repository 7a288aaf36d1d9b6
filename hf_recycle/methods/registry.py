"""The tables of what can be chosen by name, and what each entry needs to know. Their functions are in the modules that
are named here."""

from collections.abc import Callable, Iterator

from hf_recycle.utils.registry import Registry

CRITERIA: Registry[Callable] = Registry("selection criterion", "hf_recycle.methods.recycling.selection")
REINITIALIZATIONS: Registry[Callable] = Registry("reinitialization", "hf_recycle.methods.recycling.births")

STATISTICS = {
    "mean": "mean activation, (d_ff,)",
    "mean_abs": "mean absolute activation, (d_ff,)",
    "second_moment": "mean squared activation, (d_ff,)",
    "cross_moment": "mean of h hᵀ over positions, (d_ff, d_ff)",
    "taylor": "mean of (g (h − E h))², where g = ∂loss/∂h, (d_ff,)",
    "in_gradient": "mean absolute gradient of the in-row, over the extra batches together, (d_ff,)",
    "descent": "sum of δ xᵀ, where δ = ∂loss/∂(output of the block) and x is its input, (d_model, d_model)",
    "token_inputs": "x at tokens drawn in proportion to their loss, as many as may be reborn, (n, d_model)",
}
"""What a probe can gather of the neurons of one block, see `hf_recycle.methods.probe`; h is the input of the
out-projection."""

FOLDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "mean": frozenset({"mean"}),
    "least_squares": frozenset({"cross_moment"}),
}
"""What becomes of what removed neurons did, see `hf_recycle.methods.folding`, and the statistics that takes."""

GRADIENTS = frozenset({"taylor", "in_gradient", "descent"})
"""Those that take a backward pass."""


def needs(*statistics: str) -> Callable[[Callable], Callable]:
    """Decorator: the function looks at `statistics`, some of `STATISTICS`, of the current batches. They are gathered
    before it is called; nothing else is."""
    unknown = set(statistics) - STATISTICS.keys()
    if unknown:
        raise ValueError(f"unknown statistic {min(unknown)!r}: choose some of {', '.join(STATISTICS)}")

    def declare(function: Callable) -> Callable:
        function.needs = frozenset(statistics)  # type: ignore[attr-defined]
        return function

    return declare


def needs_of(function: Callable) -> frozenset[str]:
    """The statistics that a function declares by `needs`; none by default."""
    return getattr(function, "needs", frozenset())


def by_weights(registry: Registry) -> Iterator[str]:
    """The entries of a table that look at weights alone, so that they need no data."""
    return (name for name in registry if not needs_of(registry[name]))
