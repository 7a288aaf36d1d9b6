"""Masks for language modelling, vectorised, by random keys of the examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_recycle.batches import counter
from hf_recycle.batches.clock import moments_of_batch
from hf_recycle.batches.padding import batch_examples
from hf_recycle.mlm.loss import IGNORED
from hf_recycle.mlm.mask_rates import MaskRates


def mask_tokens(
    input_ids: np.ndarray,
    maskable: np.ndarray,
    real: np.ndarray,
    keys: np.ndarray,
    *,
    mask_token_id: int,
    vocab_size: int,
    mlm_probability: float | np.ndarray,
    mask_replace_prob: float,
    random_replace_prob: float,
    word_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask each sequence by its own random numbers, which its key decides. Padding changes nothing.

    Args:
        input_ids: int64 `(batch, sequence)`, left as it is.
        maskable: bool `(batch, sequence)`, false for special tokens.
        real: bool `(batch, sequence)`, false for padding, which is never masked.
        keys: uint64 `(batch,)`.
        mask_token_id: what a share `mask_replace_prob` of the chosen tokens becomes.
        vocab_size: a share `random_replace_prob` becomes a token drawn uniformly from [0, vocab_size).
        mlm_probability: chance of each maskable token to be chosen, one for all or `(batch,)`. Chosen tokens that are
            not replaced stay.
        word_starts: `(batch, sequence)`, nonzero where a token begins a word: its tokens are chosen together. What
            is not maskable ends a word. None: each token is a word.

    Returns:
        `(inputs, labels)`, both int64 `(batch, sequence)`; labels are the original token where one was
        chosen and -100 elsewhere.
    """
    every = real.all()
    positions = np.arange(real.shape[1])[None] if every else np.maximum(real.cumsum(axis=1) - 1, 0)
    lots = counter.uniform(counter.draw(keys[:, None], positions, 0, of=3))
    if word_starts is not None:
        lots = np.take_along_axis(lots, _first_of_word(word_starts != 0, maskable & real), axis=1)
    rows, columns = np.nonzero((lots < np.reshape(mlm_probability, (-1, 1))) & maskable & real)

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


def _first_of_word(starts: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """For each token the place of the first one of its word: int64 `(batch, sequence)`."""
    starts = starts | ~maskable
    starts[:, 1:] |= ~maskable[:, :-1]
    places = np.arange(starts.shape[1])
    return np.maximum.accumulate(np.where(starts, places, 0), axis=1)


class MaskedLanguageModelingCollator:
    """Pads examples and masks them by `mask_tokens`: the stock `DataCollatorForLanguageModeling`, faster.

    Like the stock one it draws from torch's global generator, one key for each example, and a `RecyclingTrainer`
    makes that a pure function of seed, epoch and example.

    Args:
        tokenizer: gives the mask and padding tokens, the padding side, the special tokens and the
            vocabulary size.
        mlm_probability, mask_replace_prob, random_replace_prob, pad_to_multiple_of: as in the stock collator.
        seed: the seed by which a `RecyclingTrainer` draws; None: that of the training.
        whole_word_mask: mask all tokens of a word or none of them. A word is chosen as a token is, so that the share of
            masked tokens stays `mlm_probability` (the stock collator masks a word if any of its tokens is chosen).
        mask_rates: a schedule that takes the place of `mlm_probability` while a `RecyclingTrainer` trains; evaluations
            and everything else mask `mlm_probability`.

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
        seed: int | None = None,
        whole_word_mask: bool = False,
        mask_rates: MaskRates | None = None,
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
        self.whole_word_mask = whole_word_mask
        self.mask_rates = mask_rates

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """A batch of `input_ids` and `labels`, int64 `(batch, sequence)`, and the examples' other columns.

        Examples are mappings with `input_ids`, or bare sequences of ids; their values lists, arrays or
        tensors. `special_tokens_mask` says what may be masked, if present, and is left out of the batch;
        otherwise the tokenizer's `get_special_tokens_mask`. `word_starts`, nonzero where a token begins a word, is
        needed for `whole_word_mask`, and left out too. `attention_mask` is in the batch only if the
        examples bring one or padding was needed: full sequences attend faster without. Their `labels` and
            `offset_mapping` are dropped.

        Raises:
            ValueError: examples that can't make a batch (see `batch_examples`), or have no `word_starts`.
        """
        batch = batch_examples(examples, self.tokenizer, self.pad_to_multiple_of)
        columns = batch.columns
        special, starts = columns.pop("special_tokens_mask", None), columns.pop("word_starts", None)
        if self.whole_word_mask and starts is None:
            raise ValueError(
                "whole_word_mask=True needs a column word_starts beside input_ids; set remove_unused_columns=False so "
                "that it reaches the collator"
            )
        if special is None:
            special = special_tokens(self.tokenizer, columns["input_ids"])
        columns["input_ids"], columns["labels"] = mask_tokens(
            columns["input_ids"],
            special == 0,
            batch.real,
            torch.randint(2**63 - 1, (len(examples),)).numpy().astype(np.uint64),
            mask_token_id=self.tokenizer.mask_token_id,
            vocab_size=len(self.tokenizer),
            mlm_probability=self._rates(),
            mask_replace_prob=self.mask_replace_prob,
            random_replace_prob=self.random_replace_prob,
            word_starts=starts if self.whole_word_mask else None,
        )
        if batch.padded and "attention_mask" not in columns:
            columns["attention_mask"] = batch.real.astype(np.int64)
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _rates(self) -> float | np.ndarray:
        """The chance of a token to be masked: that of each example, `(batch,)`, by when it is trained."""
        if self.mask_rates is None or (when := moments_of_batch()) is None:
            return self.mlm_probability
        return self.mask_rates.at(*when)


def special_tokens(tokenizer: Any, input_ids: np.ndarray) -> np.ndarray:
    """Which tokens the tokenizer's `get_special_tokens_mask` calls special: bool, in the shape of `input_ids`."""
    method = tokenizer.get_special_tokens_mask
    if getattr(method, "__module__", "").startswith("transformers."):
        return np.isin(input_ids, tokenizer.all_special_ids)  # what it does, for all rows at once
    rows = [method(row, already_has_special_tokens=True) for row in input_ids.tolist()]
    return np.array(rows, dtype=bool).reshape(input_ids.shape)
