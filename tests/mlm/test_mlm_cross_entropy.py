"""The cross entropy that turns log-probabilities into gradients where they are, against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_recycle.mlm.cross_entropy import compact_loss, summed_cross_entropy


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 40),
    ignored=st.floats(0, 1),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 100),
)
def test_loss_and_gradients_are_those_of_torch(tokens, vocabulary, ignored, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = summed_cross_entropy(ours, labels)
    reference = F.cross_entropy(theirs.float(), labels, ignore_index=-100, reduction="sum")
    assert torch.equal(loss, reference)
    (loss / 7).backward()
    (reference / 7).backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not ours.grad[labels == -100].any()
    assert torch.equal(ours.detach(), logits)


def test_one_array_is_made_in_the_backward_pass():
    logits = torch.randn(8, 500, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.arange(8))
    (log_probabilities, _) = loss.grad_fn.saved_tensors
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == log_probabilities.data_ptr()


def test_a_second_backward_pass_is_refused():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.arange(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("items", [0, torch.tensor(0.0)])
def test_nothing_masked_is_a_loss_of_zero(items):
    logits = torch.randn(4, 7, requires_grad=True)
    loss = compact_loss(logits, torch.full((4,), -100), items)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(4, 7))
