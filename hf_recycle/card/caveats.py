"""What a card says its numbers were compared with, and what a run does not show."""

from collections.abc import Mapping
from typing import Any

from hf_recycle.card.facts import BUILT_IN_CORPUS


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


def limitations(facts: Mapping[str, Any]) -> list[str]:
    """Sentences, the weightiest first, for the facts of a run."""
    sentences = []
    if changes_training(facts):
        sentences.append(
            'The article that the methods follow ("Neuron Recycling", 2023) found no variant of recycling that trains '
            "better than plain training does."
        )
    seed = "" if facts["seed"] is None else f" (seed {facts['seed']})"
    sentences.append(f"It is one run with one seed{seed}: a small difference from another run may be chance.")
    if facts["data_name"] == BUILT_IN_CORPUS:
        sentences.append(
            "The corpus is about 2 MB of English documentation of Python: enough to show what happens to neurons, far "
            "too little for a language model of any use."
        )
    if facts["evaluation"] and facts["task"].tag == "masked-lm":
        sentences.append(
            "Loss, perplexity and accuracy are over masked tokens only, with masks that are the same in each "
            "evaluation; they compare only with runs on the same data, tokenizer and masking."
        )
    for step, before, now in facts["resizes"]:
        sentences.append(
            f"At step {step:,} {before:,} feed-forward neurons became {now:,} (hf-recycle resize): what is said of "
            "neurons is said of those that are there now."
        )
    if not facts["evaluation"]:
        sentences.append("It was not evaluated on data that it was not trained on.")
    return sentences


def changes_training(facts: Mapping[str, Any]) -> bool:
    """Whether a method was on that does more than record."""
    return any(method["prefix"] != "magnitude_" for method in facts["methods"])
