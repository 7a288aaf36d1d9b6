"""How many positions the head computes."""

import copy
import math

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import concatenate, slice_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hf_recycle.mlm.capacity import CountingCollator, counted, masked_tokens, padded_count
from hf_recycle.mlm.loss import lm_loss, padded_positions

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
        loss = lm_loss(head(hidden[positions]), targets, num_items=5)
        loss.backward()
        return loss.detach(), hidden.grad, head.weight.grad, head.bias.grad

    exact, padded = run(5), run(64)
    assert not padded[1][0].any()
    for one, other in zip(exact, padded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-15)


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_the_usual_size_is_large_enough_and_depends_on_the_shape_alone(tokens, masked, share):
    masked = round(masked * tokens)
    size = padded_count(masked, tokens, share)
    if size is not None:
        assert size >= masked
        assert size % 8 == 0
        assert size == padded_count(size, tokens, share)


@pytest.mark.parametrize(("tokens", "share"), [(48, 0.15), (4096, 0.15), (32768, 0.15), (512, 0.4)])
def test_nearly_all_batches_have_the_usual_size(tokens, share):
    drawn = np.random.default_rng(0).binomial(tokens, share, 2000)
    sizes = {padded_count(int(masked), tokens, share) for masked in drawn}
    [size] = sizes
    assert size <= tokens * share + 4 * math.sqrt(tokens * share * (1 - share)) + 8


@pytest.mark.parametrize("masked", [200, 900])
def test_much_padding_or_a_rare_large_batch_has_another_size(masked):
    assert padded_count(masked, 4096, 0.15) is None


LABELS_OF_THREE = torch.tensor([[1, -100, 2], [-100, -100, 0]])


@pytest.fixture
def not_counted(monkeypatch):
    """Counting labels again, which waits for an accelerator, is an error."""
    monkeypatch.setattr(torch.Tensor, "__ne__", lambda *_: pytest.fail("counted again"))


def through_a_loader(collator, **settings):
    """A batch as Accelerate's loader gives it."""
    loader = DataLoader([0, 1], batch_size=2, collate_fn=collator, **settings)
    return next(iter(prepare_data_loader(loader, device=torch.device("cpu"), put_on_device=True)))


class Fixed:
    """A collator, for data workers too."""

    def __init__(self, kind: type):
        self.kind = kind

    def __call__(self, examples):
        return self.kind({"input_ids": torch.ones(2, 3), "labels": LABELS_OF_THREE.clone()})


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_count_goes_with_the_batch_and_is_no_part_of_it(kind, workers, request):
    batch = through_a_loader(CountingCollator(Fixed(kind)), num_workers=workers)
    request.getfixturevalue("not_counted")
    assert isinstance(batch, kind)
    assert set(batch) == {"input_ids", "labels"}
    assert masked_tokens(batch["labels"]) == 3


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_the_count_survives_pinning(kind):
    """What torch does with a mapping to pin it."""
    batch = CountingCollator(Fixed(kind))([])
    pinned = copy.copy(batch)
    pinned.update({name: value.clone() for name, value in batch.items()})
    assert pinned.to("cpu")["labels"].masked_tokens[0] == 3


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_labels_that_were_changed_or_exchanged_are_counted_again(kind):
    batch = through_a_loader(CountingCollator(Fixed(kind)))
    batch["labels"][0, 1] = 7
    assert masked_tokens(batch["labels"]) == 4
    batch["labels"] = torch.full((2, 3), 5)
    assert masked_tokens(batch["labels"]) == 6


def test_a_part_of_a_counted_batch_has_no_count():
    """As Accelerate's dispatcher makes the batches of the processes."""
    batch = CountingCollator(Fixed(dict))([])
    part = slice_tensors(concatenate([batch, batch]), slice(0, 1)).to("cpu")
    assert masked_tokens(part["labels"]) == 2


@pytest.mark.parametrize(
    "batch", [{"input_ids": torch.ones(2, 3)}, torch.ones(3), {"labels": [[1, 2]]}, {"labels": None}]
)
def test_other_batches_pass_as_they_are(batch):
    assert counted(batch) is batch
