"""Masks depend on seed, pass and sample alone."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_recycle.mlm import counter
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
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
