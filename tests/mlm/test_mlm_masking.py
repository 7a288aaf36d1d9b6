"""Masks depend on seed, pass and sample alone, and are distributed as they should be."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BatchEncoding, DataCollatorForLanguageModeling

from hf_recycle.mlm import counter
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator, mask_tokens
from hf_recycle.mlm.passes import PASS_COLUMN

SPECIAL_IDS = [0, 1, 2, 3, 4]
MASK, VOCABULARY = 4, 200
SHARES = {"mlm_probability": 0.15, "mask_replace_prob": 0.8, "random_replace_prob": 0.1}


def rows(batch: dict[str, torch.Tensor]) -> dict[tuple, tuple]:
    """{original real tokens: (masked tokens, labels)} of a batch, padding taken off."""
    result = {}
    for i, (inputs, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        real = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones_like(inputs).bool()
        original = torch.where(labels == -100, inputs, labels)[real]
        result[tuple(original.tolist())] = (tuple(inputs[real].tolist()), tuple(labels[real].tolist()))
        assert (labels[~real] == -100).all()
    return result


def one_by_one(collator, sequences) -> dict[tuple, tuple]:
    return {key: value for s in sequences for key, value in rows(collator([{"input_ids": s}])).items()}


def global_state() -> tuple:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


# the same sample, the same mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_masks_do_not_depend_on_the_batch(make_tokenizer, sequences, side, multiple):
    alone = one_by_one(MaskedLanguageModelingCollator(make_tokenizer()), sequences)
    collator = MaskedLanguageModelingCollator(make_tokenizer(padding_side=side), pad_to_multiple_of=multiple)
    order = np.random.default_rng(1).permutation(len(sequences))
    together = {}
    for start in range(0, len(order), 7):
        batch = collator([{"input_ids": sequences[i]} for i in order[start : start + 7]])
        assert multiple is None or batch["input_ids"].shape[1] % multiple == 0
        together |= rows(batch)
    assert together == alone
    assert set(alone) == {tuple(s) for s in sequences}


def test_padding_by_the_caller_changes_no_mask(tokenizer, sequences):
    collator = MaskedLanguageModelingCollator(tokenizer)
    padded = [
        {"input_ids": s + [0] * (40 - len(s)), "attention_mask": [1] * len(s) + [0] * (40 - len(s))} for s in sequences
    ]
    assert rows(collator(padded)) == one_by_one(collator, sequences)


class Loaded:
    """A dataset of sequences; a class of the module, so that spawned workers find it."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, i):
        return {"input_ids": self.sequences[i]}


@pytest.mark.parametrize(
    ("workers", "persistent", "context"),
    [(0, False, None), (2, False, "fork"), (2, True, "fork"), (2, True, "spawn")],
)
def test_masks_in_data_workers_follow_the_pass(tokenizer, sequences, workers, persistent, context):
    collator = MaskedLanguageModelingCollator(tokenizer, seed=3)
    loader = DataLoader(
        Loaded(sequences),
        batch_size=8,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=context,
    )
    seen = []
    for number in range(3):
        collator.set_pass(number)
        seen.append({key: value for batch in loader for key, value in rows(batch).items()})
    reference = MaskedLanguageModelingCollator(tokenizer, seed=3)
    for number in range(3):
        reference.set_pass(number)
        assert seen[number] == one_by_one(reference, sequences)
    assert seen[0] != seen[1] != seen[2]


def test_passes_and_seeds_give_other_masks(tokenizer, sequences):
    labels = {}
    for seed in (0, 1, -1, 2**70 + 5):
        for number in (0, 1):
            collator = MaskedLanguageModelingCollator(tokenizer, seed=seed, mlm_probability=0.5)
            collator.set_pass(number)
            labels[seed, number] = collator([{"input_ids": s} for s in sequences])["labels"] != -100
    maskable = sum(len(s) - 2 for s in sequences)
    for a in labels:
        for b in labels:
            if a < b:  # independent fair coins: about half of the places differ
                assert 0.4 < (labels[a] ^ labels[b]).sum() / maskable < 0.6, (a, b)


def test_a_sample_may_say_its_own_pass(tokenizer, sequences):
    collator = MaskedLanguageModelingCollator(tokenizer)
    collator.set_pass(7)
    tagged = collator([{"input_ids": s, PASS_COLUMN: i % 3} for i, s in enumerate(sequences)])
    assert set(tagged) == {"input_ids", "labels", "attention_mask"}
    expected = {}
    for i, s in enumerate(sequences):
        collator.set_pass(i % 3)
        expected |= rows(collator([s]))
    assert rows(tagged) == expected


def test_similar_samples_have_unrelated_masks(tokenizer):
    # One token changed, moved or added: the content hash must tell them apart.
    base = list(range(5, 105))
    variants = [base, [*base[:50], 150, *base[51:]], [base[1], base[0], *base[2:]], [*base, 5], base[::-1]]
    collator = MaskedLanguageModelingCollator(tokenizer, mlm_probability=0.5)
    masks = [collator([v])["labels"][0, :100] != -100 for v in variants]
    for i in range(len(masks)):
        for j in range(i):
            assert 30 < (masks[i] ^ masks[j]).sum() < 70, (i, j)


def test_content_hashes_do_not_collide():
    ids = np.array([[a, b, c] for a in range(40) for b in range(40) for c in range(40)])
    hashes = counter.content_hash(ids, np.ones(ids.shape, bool), np.arange(3)[None])
    assert len(np.unique(hashes)) == len(ids)


def test_evaluation_masks_never_change(tokenizer, sequences):
    training = MaskedLanguageModelingCollator(tokenizer, seed=1)
    evaluation = training.for_evaluation()
    first = rows(evaluation(sequences))
    evaluation.set_pass(5)
    training.set_pass(5)
    assert rows(evaluation(sequences)) == first
    assert rows(evaluation([{"input_ids": s, PASS_COLUMN: 4} for s in sequences])) == first
    assert rows(MaskedLanguageModelingCollator(tokenizer, seed=2).for_evaluation()(sequences)) == first
    assert rows(training(sequences)) != first
    assert training.seed == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_keep_the_pass_and_go_their_own_way(tokenizer, sequences, clone):
    collator = MaskedLanguageModelingCollator(tokenizer, seed=9)
    collator.set_pass(2)
    twin = clone(collator)
    assert rows(twin(sequences)) == rows(collator(sequences))
    twin.set_pass(3)
    assert twin._passes._value.is_shared()
    assert rows(twin(sequences)) != rows(collator(sequences))


def test_the_global_random_state_is_neither_read_nor_changed(tokenizer, sequences):
    collator = MaskedLanguageModelingCollator(tokenizer)
    torch.manual_seed(0)
    first = rows(collator(sequences))
    before = global_state()
    second = rows(collator(sequences))
    assert global_state() == before
    torch.manual_seed(1)
    assert first == second == rows(collator(sequences))


# the distribution


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
    inputs, labels = mask_tokens(ids, every, every, 0, 0, mask_token_id=MASK, vocab_size=VOCABULARY, **names)
    assert ((labels == ids).all()) if fates else (labels == -100).all()
    assert (inputs == MASK).all() == (fates == {"mask"})
    assert (inputs == ids).all() == (fates in ({"kept"}, set()))


def test_mask_tokens_leaves_its_arguments_alone():
    ids = np.random.default_rng(6).integers(5, VOCABULARY, (5, 30))
    every = np.ones(ids.shape, bool)
    before = ids.copy()
    inputs, labels = mask_tokens(ids, every, every, 0, 0, mask_token_id=MASK, vocab_size=VOCABULARY, **SHARES)
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


# the batch


def test_full_sequences_bring_no_attention_mask(tokenizer):
    collator = MaskedLanguageModelingCollator(tokenizer)
    full = [list(range(5, 21)), list(range(6, 22))]
    assert set(collator(full)) == {"input_ids", "labels"}
    assert set(collator([*full, [7]])) == {"input_ids", "labels", "attention_mask"}
    carried = [{"input_ids": s, "attention_mask": [1] * 16} for s in full]
    assert set(collator(carried)) == {"input_ids", "labels", "attention_mask"}


def test_padding_equals_the_stock_collator(make_tokenizer, sequences):
    for side in ("left", "right"):
        tokenizer = make_tokenizer(padding_side=side)
        examples = [
            {
                "input_ids": s,
                "token_type_ids": [i % 2 for i in range(len(s))],
                "special_tokens_mask": [1] * len(s),
            }
            for s in sequences
        ]  # nothing may be masked, so that only padding is compared
        ours = MaskedLanguageModelingCollator(tokenizer, pad_to_multiple_of=8)(examples)
        stock = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=8)(examples)
        assert set(ours) == set(stock)
        for name, column in ours.items():
            assert torch.equal(column, stock[name]), name
            assert column.dtype == torch.int64


def test_special_tokens_mask_decides(tokenizer):
    ids = list(range(2, 102))
    only = [i % 2 for i in range(100)]
    collator = MaskedLanguageModelingCollator(tokenizer, mlm_probability=1.0)
    batch = collator([{"input_ids": ids, "special_tokens_mask": only}])
    assert ((batch["labels"][0] == -100).long() == torch.tensor(only)).all()
    assert "special_tokens_mask" not in batch
    assert ((batch_labels := collator([ids])["labels"][0])[:3] == -100).all()
    assert (batch_labels[3:] != -100).all()


def test_every_kind_of_example_gives_the_same_batch(tokenizer, sequences):
    collator = MaskedLanguageModelingCollator(tokenizer)
    for group in (sequences, [s[:5] for s in sequences]):
        reference = collator(group)
        kinds = [
            [tuple(s) for s in group],
            [np.array(s, dtype=np.int32) for s in group],
            [torch.tensor(s) for s in group],
            [{"input_ids": s} for s in group],
            [{"input_ids": np.array(s)} for s in group],
            [{"input_ids": torch.tensor(s), "labels": torch.tensor(s)} for s in group],
            [BatchEncoding({"input_ids": s}) for s in group],
        ]
        for examples in kinds:
            batch = collator(examples)
            assert set(batch) == set(reference)
            assert all(torch.equal(batch[name], reference[name]) for name in batch)


def test_other_columns(tokenizer):
    examples = [
        {
            "input_ids": [5, 6, 7],
            "position_ids": [0, 1, 2],
            "weight": 0.5,
            "row": 3,
            "offset_mapping": [(0, 1)] * 3,
        },
        {
            "input_ids": [5, 6],
            "position_ids": [0, 1],
            "weight": 1.5,
            "row": 4,
            "offset_mapping": [(0, 1)] * 2,
        },
    ]
    batch = MaskedLanguageModelingCollator(tokenizer)(examples)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids", "weight", "row"}
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["weight"].tolist() == [0.5, 1.5]
    assert batch["row"].tolist() == [3, 4]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 1, 4, 8]),
    share=st.sampled_from([0.0, 0.15, 1.0]),
)
def test_shapes_of_ragged_batches(make_tokenizer, data, side, multiple, share):
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
    group = data.draw(st.lists(tokens, min_size=1, max_size=6))
    tokenizer = make_tokenizer(padding_side=side)
    collator = MaskedLanguageModelingCollator(tokenizer, mlm_probability=share, pad_to_multiple_of=multiple)
    batch = collator([{"input_ids": s} for s in group])
    longest = max(map(len, group))
    width = longest if multiple is None else (longest + multiple - 1) // multiple * multiple
    assert ("attention_mask" in batch) == any(len(s) < width for s in group)
    for name, column in batch.items():
        assert column.shape == (len(group), width), name
        assert column.dtype == torch.int64, name
    for i, s in enumerate(group):
        padding = [0] * (width - len(s))
        original = torch.where(batch["labels"][i] == -100, batch["input_ids"][i], batch["labels"][i]).tolist()
        assert original == (padding + s if side == "left" else s + padding)
        if share != 0.15:
            masked = [t >= 5 and share == 1.0 for t in original]
            assert (batch["labels"][i] != -100).tolist() == masked


# bad input


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([{"text": "x"}], "no input_ids"),
        ([{"input_ids": [[5, 6]]}], "input_ids"),
        ([{"input_ids": ["a", "b"]}], "input_ids"),
        ([{"input_ids": [0.5, 1.5]}], "whole numbers"),
        ([{"input_ids": [5], "x": 1}, {"input_ids": [5]}], "same columns"),
        ([{"input_ids": [5], "x": [1, 2]}, {"input_ids": [5], "x": [1]}], "'x'"),
        ([{"input_ids": [5], "text": "five"}], "'text'"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "'attention_mask'"),
    ],
)
def test_examples_that_make_no_batch(tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModelingCollator(tokenizer)(examples)


def test_padding_without_a_padding_token(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    collator = MaskedLanguageModelingCollator(tokenizer)
    assert collator([[5, 6], [7, 8]])["input_ids"].shape == (2, 2)
    with pytest.raises(ValueError, match="no padding token"):
        collator([[5, 6], [7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"mask_replace_prob": -0.1}, "mask_replace_prob=-0.1"),
        ({"random_replace_prob": 2}, "random_replace_prob=2"),
        ({"mask_replace_prob": 0.7, "random_replace_prob": 0.4}, "more than 1"),
    ],
)
def test_settings_out_of_range(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModelingCollator(tokenizer, **options)


def test_a_tokenizer_without_a_mask_token(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLanguageModelingCollator(tokenizer)
