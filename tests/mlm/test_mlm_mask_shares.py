"""Masks are distributed as they should be."""

import numpy as np
import pytest
from transformers import DataCollatorForLanguageModeling

from hf_recycle.batches import counter
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator, mask_tokens

SPECIAL_IDS = [0, 1, 2, 3, 4]
MASK, VOCABULARY = 4, 200
SHARES = {"mlm_probability": 0.15, "mask_replace_prob": 0.8, "random_replace_prob": 0.1}
IDS = {"mask_token_id": MASK, "vocab_size": VOCABULARY}
KEYS = np.arange(100, dtype=np.uint64)


@pytest.fixture(scope="module")
def many(tokenizer):
    """Half a million tokens, a tenth of them special, masked."""
    rng = np.random.default_rng(2)
    ids = rng.integers(5, VOCABULARY, (4000, 128))
    ids[rng.random(ids.shape) < 0.1] = 3
    batch = MaskedLanguageModelingCollator(tokenizer)([*ids])
    return ids, batch["input_ids"].numpy(), batch["labels"].numpy()


def within(count: int, trials: int, share: float) -> bool:
    """Whether a binomial count is within 4.5 standard deviations (one failure in 150,000 draws)."""
    return abs(count - trials * share) < 4.5 * (trials * share * (1 - share)) ** 0.5


def test_shares(many):
    ids, inputs, labels = many
    chosen = labels != -100
    maskable = ~np.isin(ids, SPECIAL_IDS)
    assert not (chosen & ~maskable).any()
    assert (inputs[~chosen] == ids[~chosen]).all()
    assert (labels[chosen] == ids[chosen]).all()
    assert within(chosen.sum(), maskable.sum(), 0.15)
    total = chosen.sum()
    assert within((inputs[chosen] == MASK).sum(), total, 0.8 + 0.1 / VOCABULARY)
    assert within((inputs[chosen] == ids[chosen]).sum(), total, 0.1 + 0.1 / VOCABULARY)


def test_random_tokens_are_uniform(many):
    ids, inputs, labels = many
    # Drawn tokens that happen to be [MASK] or the original can't be told from the other fates.
    drawn = inputs[(labels != -100) & (inputs != MASK) & (inputs != ids)]
    counts = np.delete(np.bincount(drawn, minlength=VOCABULARY), MASK)
    assert len(counts) == VOCABULARY - 1
    assert (counts > 0).all()  # special tokens too, as the stock collator draws them
    # The original token is missing among the ordinary ones: each is expected 194/195 as often.
    weights = np.where(np.arange(VOCABULARY) < 5, 1.0, 1 - 1 / 195)
    expected = np.delete(weights, MASK) / np.delete(weights, MASK).sum() * counts.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    assert abs(chi_square - degrees) < 4.5 * (2 * degrees) ** 0.5


def test_places_are_independent(many):
    ids, inputs, labels = many
    chosen = (labels != -100).astype(float)
    usable = ~np.isin(ids, SPECIAL_IDS)
    for column in range(128):
        assert within(int(chosen[:, column].sum()), int(usable[:, column].sum()), 0.15), column
    for lag in (1, 2, 3, 64):
        both = usable[:, lag:] & usable[:, :-lag]
        pairs = (chosen[:, lag:] * chosen[:, :-lag])[both]
        assert within(int(pairs.sum()), len(pairs), 0.15**2), lag
    # What becomes of a token is independent of its neighbour's fate and of the draw that chose it.
    replaced = (inputs == MASK) & (labels != -100)
    both = (labels[:, 1:] != -100) & (labels[:, :-1] != -100)
    assert within(int((replaced[:, 1:] & replaced[:, :-1])[both].sum()), int(both.sum()), 0.8005**2)


def test_samples_are_independent(many):
    _, _, labels = many
    chosen = labels != -100
    pairs = chosen[1:] & chosen[:-1]
    assert within(int(pairs.sum()), pairs.size, float(chosen.mean()) ** 2)


def test_statistics_equal_those_of_the_stock_collator(tokenizer):
    rng = np.random.default_rng(4)
    examples = [{"input_ids": [2, *row, 3]} for row in rng.integers(5, VOCABULARY, (600, 126)).tolist()]
    shares = {"mlm_probability": 0.3, "mask_replace_prob": 0.5, "random_replace_prob": 0.3}
    ids = np.array([e["input_ids"] for e in examples])

    def statistics(collator) -> np.ndarray:
        batch = collator(examples)
        chosen = batch["labels"].numpy() != -100
        inputs = batch["input_ids"].numpy()
        kept, masked = (inputs == ids)[chosen], (inputs == MASK)[chosen]
        return np.array([chosen.mean(), kept.mean(), masked.mean(), inputs[chosen][~kept & ~masked].mean()])

    ours = statistics(MaskedLanguageModelingCollator(tokenizer, **shares))
    stock = statistics(DataCollatorForLanguageModeling(tokenizer, seed=0, **shares))
    assert np.abs(ours - stock)[:3].max() < 0.02
    assert abs(ours[3] - stock[3]) < 3  # mean random token, about 100


@pytest.mark.parametrize(
    ("shares", "fates"),
    [
        ((1.0, 1.0, 0.0), {"mask"}),
        ((1.0, 0.0, 1.0), {"random"}),
        ((1.0, 0.0, 0.0), {"kept"}),
        ((0.0, 0.8, 0.1), set()),
    ],
)
def test_extreme_shares_are_exact(shares, fates):
    ids = np.random.default_rng(5).integers(5, VOCABULARY, (50, 128))
    every = np.ones(ids.shape, bool)
    names = dict(zip(SHARES, shares, strict=True))
    inputs, labels = mask_tokens(ids, every, every, KEYS[: len(ids)], **IDS, **names)
    assert ((labels == ids).all()) if fates else (labels == -100).all()
    assert (inputs == MASK).all() == (fates == {"mask"})
    assert (inputs == ids).all() == (fates in ({"kept"}, set()))


def test_mask_tokens_leaves_its_arguments_alone():
    ids = np.random.default_rng(6).integers(5, VOCABULARY, (5, 30))
    every = np.ones(ids.shape, bool)
    before = ids.copy()
    inputs, labels = mask_tokens(ids, every, every, KEYS[: len(ids)], **IDS, **SHARES)
    assert (ids == before).all()
    assert (inputs != ids).any()
    assert inputs.dtype == labels.dtype == np.int64


def test_splitmix64_reference():
    # The published first outputs of splitmix64 seeded with 1234567.
    words = counter.draw(np.array([1234567], np.uint64), np.arange(5), 0, of=1)
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
