"""What a card says about what a run does not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_recycle.card.comparisons import changes_training
from hf_recycle.card.facts import BUILT_IN_CORPUS


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
