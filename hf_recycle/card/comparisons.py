"""What a card says about what its numbers were compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def comparisons(facts: Mapping[str, Any]) -> list[str]:
    """Sentences for the facts of a run."""
    sentences = ["The numbers compare this run with itself over training."]
    if facts["unigram_entropy"]:
        sentences.append(
            f"A model that knows only how frequent tokens are would reach {facts['unigram_entropy']:.4f} nats (the "
            "unigram entropy)."
        )
    if changes_training(facts):
        sentences.append(
            "This run was not compared with a baseline: nothing here says that the methods helped it. For that, train "
            "the same recipe without them, on the same seeds, and compare."
        )
    return sentences


def changes_training(facts: Mapping[str, Any]) -> bool:
    """Whether a method was on that does more than record."""
    return any(method["prefix"] != "magnitude_" for method in facts["methods"])
