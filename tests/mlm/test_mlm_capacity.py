"""How many positions the head computes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from hf_recycle.mlm.capacity import MASKED_TOKENS, CountingCollator, usual_size
from hf_recycle.mlm.loss import masked_lm_loss, padded_positions

LABELS = st.lists(st.lists(st.sampled_from([-100, 0, 3, 7]), min_size=5, max_size=5), min_size=1, max_size=6)


@given(LABELS, st.integers(0, 40))
def test_positions_and_their_labels_then_padding(labels, more):
    labels = torch.tensor(labels)
    expected = [(i, label) for i, label in enumerate(labels.flatten().tolist()) if label != -100]
    size = len(expected) + more
    positions, targets = padded_positions(labels, size)
    assert positions.dtype == targets.dtype == torch.int64
    assert list(zip(positions.tolist(), targets.tolist(), strict=True)) == expected + [(0, -100)] * more


def test_no_token_is_dropped():
    labels = torch.tensor([[1, -100, 2], [3, -100, -100]])
    with pytest.raises(RuntimeError, match="labels changed after their masked tokens were counted"):
        padded_positions(labels, 2)


def test_padding_adds_exactly_nothing():
    """Neither to the loss nor to any gradient, not even where the padding points to."""
    torch.manual_seed(0)
    hidden, head = torch.randn(12, 4, dtype=torch.float64, requires_grad=True), nn.Linear(4, 9).double()
    labels = torch.tensor([-100, 5, -100, -100, 2, -100, 8, 0, -100, -100, -100, 1])

    def run(size):
        positions, targets = padded_positions(labels, size)
        hidden.grad = head.weight.grad = head.bias.grad = None
        loss = masked_lm_loss(head(hidden[positions]), targets, num_items=5)
        loss.backward()
        return loss.detach(), hidden.grad, head.weight.grad, head.bias.grad

    exact, padded = run(5), run(64)
    assert not padded[1][0].any()
    for one, other in zip(exact, padded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-15)


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_the_usual_size_is_large_enough_and_depends_on_the_shape_alone(tokens, masked, share):
    masked = round(masked * tokens)
    size = usual_size(masked, tokens, share)
    if size is not None:
        assert size >= masked
        assert size % 8 == 0
        assert size == usual_size(size, tokens, share)


@pytest.mark.parametrize(("tokens", "share"), [(48, 0.15), (4096, 0.15), (32768, 0.15), (512, 0.4)])
def test_nearly_all_batches_have_the_usual_size(tokens, share):
    drawn = np.random.default_rng(0).binomial(tokens, share, 2000)
    sizes = {usual_size(int(masked), tokens, share) for masked in drawn}
    [size] = sizes
    assert size <= tokens * share + 4 * math.sqrt(tokens * share * (1 - share)) + 8


@pytest.mark.parametrize("masked", [200, 900])
def test_much_padding_or_a_rare_large_batch_has_another_size(masked):
    assert usual_size(masked, 4096, 0.15) is None


def test_the_count_travels_with_the_batch():
    batch = BatchEncoding({"input_ids": torch.ones(2, 3), "labels": torch.tensor([[1, -100, 2], [-100, -100, 0]])})
    counted = CountingCollator(lambda examples: batch)([])
    assert counted[MASKED_TOKENS] == 3
    assert type(counted[MASKED_TOKENS]) is int  # a loader would move, slice or join a tensor
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    "batch", [{"input_ids": torch.ones(2, 3)}, torch.ones(3), {"labels": [[1, 2]]}, {"labels": None}]
)
def test_other_batches_pass_as_they_are(batch):
    assert CountingCollator(lambda examples: batch)([]) is batch
