"""The second pass over a training set: its order, its masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.batches.extra_batches import ExtraBatches
from hf_recycle.batches.numbered import Numbered
from hf_recycle.batches.seeded import SeededCollator
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator


class Places:
    """Stands for the seeded collator: which examples come, of which epoch."""

    def __init__(self, *_):
        pass

    def __call__(self, numbered):
        return [(item.example, item.epoch) for item in numbered]


@pytest.fixture(scope="module", autouse=True)
def _places():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_recycle.batches.extra_batches.SeededCollator", Places)
        yield


@given(st.integers(1, 13), st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_epoch_has_every_sample_once_however_it_is_cut(samples, seed, sizes):
    data = list(range(samples))
    whole = ExtraBatches(data, None, seed).batch(0, sum(sizes) + 3 * samples)
    cut, position = [], 0
    for size in sizes:
        cut += ExtraBatches(data, None, seed).batch(position, size)  # nothing but the position is remembered
        position += size
    assert cut == whole[:position]
    for number in range(3):
        one = whole[number * samples : (number + 1) * samples]
        assert sorted(one) == [(sample, number) for sample in range(samples)]


def test_orders_differ_by_seed_and_epoch():
    data = list(range(50))
    first, second = (ExtraBatches(data, None, seed).batch(0, 100) for seed in (0, 1))
    order = [number for number, _ in first]
    assert order[:50] != order[50:]
    assert first != second


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match="this one is empty"):
        ExtraBatches([], None, 0)


def test_masks_are_not_those_of_the_main_run(tokenizer, monkeypatch):
    """Even where the seeds are equal; and others in every epoch."""
    monkeypatch.setattr("hf_recycle.batches.extra_batches.SeededCollator", SeededCollator)
    words = [{"input_ids": [5 + number] * 40} for number in range(6)]
    collator = MaskedLanguageModelingCollator(tokenizer)
    second = ExtraBatches(words, collator, 3)

    def masks(position):
        batch = second.batch(position, 6)
        real = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[:, 0]
        assert sorted(real.tolist()) == list(range(5, 11))
        return (batch["labels"] != -100)[real.argsort()]

    first, again = masks(0), masks(6)
    assert not torch.equal(first, again)
    assert torch.equal(masks(0), first)
    main = SeededCollator(collator, 3)([Numbered(0, number, row) for number, row in enumerate(words)])
    assert not torch.equal(first, main["labels"] != -100)
