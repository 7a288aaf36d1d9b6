"""The second pass over a training set: its order, its masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.mlm.passes import PASS_COLUMN
from hf_recycle.mlm.seeded import apart
from hf_recycle.second_pass import SecondPass, mask_seed


def indices(examples):
    return [(example["number"], example[PASS_COLUMN]) for example in examples]


@given(st.integers(1, 13), st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_pass_has_every_sample_once_however_it_is_cut(samples, seed, sizes):
    data = [{"number": number} for number in range(samples)]
    whole = SecondPass(data, indices, seed).batch(0, sum(sizes) + 3 * samples)
    cut, position = [], 0
    for size in sizes:
        cut += SecondPass(data, indices, seed).batch(position, size)  # nothing but the position is remembered
        position += size
    assert cut == whole[:position]
    for number in range(3):
        one = whole[number * samples : (number + 1) * samples]
        assert sorted(one) == [(sample, number) for sample in range(samples)]


def test_orders_differ_by_seed_and_pass():
    data = [{"number": number} for number in range(50)]
    first, second = (SecondPass(data, indices, seed).batch(0, 100) for seed in (0, 1))
    order = [number for number, _ in first]
    assert order[:50] != order[50:]
    assert first != second


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match="this one is empty"):
        SecondPass([], indices, 0)


def test_masks_are_not_those_of_the_main_run(tokenizer):
    """Even where the seeds are equal; and others in every pass."""
    words = [{"input_ids": [5 + number] * 40} for number in range(6)]
    main = MaskedLanguageModelingCollator(tokenizer, seed=3)
    before = main(words)
    second = SecondPass(words, apart(main, mask_seed(3)), 3)

    def masks(position):
        batch = second.batch(position, 6)
        order = batch["input_ids"].masked_fill(batch["labels"] == -100, 0)
        real = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[:, 0]
        assert sorted(real.tolist()) == list(range(5, 11))
        return (batch["labels"] != -100)[real.argsort()], order

    first, again = masks(0)[0], masks(6)[0]
    assert not torch.equal(first, before["labels"] != -100)
    assert not torch.equal(first, again)
    assert torch.equal(masks(0)[0], first)
    main.set_pass(9)
    assert torch.equal(masks(0)[0], first)  # the main run's passes are not its own
    after = main(words)
    main.set_pass(0)
    assert not np.array_equal(after["labels"], before["labels"])
    assert torch.equal(main(words)["labels"], before["labels"])
