"""Dynamic masking as a pure function of (seed, pass over the data, sample).

A sample gets the same mask whatever batch, data worker or process it lands in, and another in every pass.
So a resumed run sees the very batches that the uninterrupted one saw, and batches that are skipped need not
be masked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_recycle.mlm import counter
from hf_recycle.mlm.batching import batch_examples
from hf_recycle.mlm.loss import IGNORED
from hf_recycle.mlm.passes import EVALUATION_SEED, PassCounter


def mask_tokens(
    input_ids: np.ndarray,
    maskable: np.ndarray,
    real: np.ndarray,
    seed: int,
    pass_: np.ndarray | int,
    *,
    mask_token_id: int,
    vocab_size: int,
    mlm_probability: float,
    mask_replace_prob: float,
    random_replace_prob: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask each sequence by its own random numbers.

    A sequence's numbers come from `seed`, its pass and its content, that is its real tokens and their
    order. So sequences that are equal get equal masks within one pass, and padding changes nothing.

    Args:
        input_ids: int64 `(batch, sequence)`, left as it is.
        maskable: bool `(batch, sequence)`, false for special tokens.
        real: bool `(batch, sequence)`, false for padding, which is never masked.
        seed: any integer; its low 64 bits count.
        pass_: the pass over the data, one for all or int64 `(batch,)`.
        mask_token_id: what a share `mask_replace_prob` of the chosen tokens becomes.
        vocab_size: a share `random_replace_prob` becomes a token drawn uniformly from [0, vocab_size).
        mlm_probability: chance of each maskable token to be chosen. Chosen tokens that are not replaced stay.

    Returns:
        `(inputs, labels)`, both int64 `(batch, sequence)`; labels are the original token where one was
        chosen and -100 elsewhere.
    """
    every = real.all()
    positions = np.arange(real.shape[1])[None] if every else np.maximum(real.cumsum(axis=1) - 1, 0)
    keys = counter.sample_keys(seed, pass_, counter.content_hash(input_ids, real, positions))
    lots = counter.uniform(counter.draw(keys[:, None], positions, 0, of=3))
    rows, columns = np.nonzero((lots < mlm_probability) & maskable & real)

    # What becomes of a token is drawn for the chosen ones alone: each draw stands by itself.
    keys, places = keys[rows], positions[0 if every else rows, columns]
    fate = counter.uniform(counter.draw(keys, places, 1, of=3))
    words = counter.below(counter.draw(keys, places, 2, of=3), vocab_size)
    chosen = input_ids[rows, columns]
    replaced = np.where(fate < mask_replace_prob + random_replace_prob, words, chosen)
    replaced = np.where(fate < mask_replace_prob, mask_token_id, replaced)

    inputs, labels = input_ids.copy(), np.full_like(input_ids, IGNORED)
    inputs[rows, columns] = replaced
    labels[rows, columns] = chosen
    return inputs, labels


class MaskedLanguageModelingCollator:
    """Pads examples and masks them by `mask_tokens`: the stock `DataCollatorForLanguageModeling`,
    reproducible.

    Args:
        tokenizer: gives the mask and padding tokens, the padding side, the special tokens and the
            vocabulary size.
        mlm_probability, mask_replace_prob, random_replace_prob, pad_to_multiple_of: as in the stock collator.
        seed: seed of the masks.

    Raises:
        ValueError: a share outside [0, 1], shares that sum to more than 1, or a tokenizer without a mask
        token.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        shares = {
            "mlm_probability": mlm_probability,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must lie in [0, 1]")
        if mask_replace_prob + random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob={mask_replace_prob} and random_replace_prob={random_replace_prob} "
                "must not sum to more than 1"
            )
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token, which masked language modelling needs")
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self._passes = PassCounter()

    def set_pass(self, number: int) -> None:
        """Say which pass over the data comes next; running data workers see it too."""
        self._passes.set(number)

    def for_evaluation(self) -> MaskedLanguageModelingCollator:
        """A copy whose masks never change: the same in every pass and, with the same shares, in every run."""
        fixed = copy.copy(self)
        fixed.seed, fixed._passes = EVALUATION_SEED, PassCounter(frozen=True)
        return fixed

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """A batch of `input_ids` and `labels`, int64 `(batch, sequence)`, and the examples' other columns.

        Examples are mappings with `input_ids`, or bare sequences of ids; their values lists, arrays or
        tensors. `special_tokens_mask` says what may be masked, if present, and is left out of the batch;
        otherwise the tokenizer's special tokens may not. `attention_mask` is in the batch only if the
        examples bring one or padding was needed: full sequences attend faster without. Their `labels` and
            `offset_mapping` are dropped.

        Raises:
            ValueError: examples that can't make a batch (see `batch_examples`).
        """
        examples, passes = self._passes.split(examples)
        batch = batch_examples(examples, self.tokenizer, self.pad_to_multiple_of)
        columns = batch.columns
        special = columns.pop("special_tokens_mask", None)
        if special is None:
            special = np.isin(columns["input_ids"], self.tokenizer.all_special_ids)
        columns["input_ids"], columns["labels"] = mask_tokens(
            columns["input_ids"],
            special == 0,
            batch.real,
            self.seed,
            passes,
            mask_token_id=self.tokenizer.mask_token_id,
            vocab_size=len(self.tokenizer),
            mlm_probability=self.mlm_probability,
            mask_replace_prob=self.mask_replace_prob,
            random_replace_prob=self.random_replace_prob,
        )
        if batch.padded and "attention_mask" not in columns:
            columns["attention_mask"] = batch.real.astype(np.int64)
        return {name: torch.from_numpy(column) for name, column in columns.items()}
