"""The loss over masked tokens against the loss that transformers' models compute."""

import math

import pytest
import torch
from torch import nn

from hf_recycle.mlm.loss import lm_loss, target_positions, token_losses


def example(seed: int, shape=(4, 33), vocabulary=211) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocabulary, generator=generator) * 3
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) > 0.15] = -100
    return logits, labels


def loss_and_gradient(function, logits):
    logits = logits.clone().requires_grad_()
    loss = function(logits)
    loss.backward()
    return loss.detach(), logits.grad


def test_target_positions():
    labels = torch.tensor([[-100, 3, -100], [0, -100, 5]])
    positions = target_positions(labels)
    assert positions.tolist() == [1, 3, 5]
    assert positions.dtype == torch.int64
    assert target_positions(torch.full((2, 2), -100)).shape == (0,)
    assert target_positions(labels.t()).tolist() == [1, 2, 5]  # not contiguous


def test_token_losses_by_hand():
    logits, labels = example(0)
    losses = token_losses(logits, labels)
    for position in range(labels.numel()):
        row, label = logits.view(-1, 211)[position].double(), int(labels.view(-1)[position])
        expected = 0.0 if label == -100 else math.log(sum(math.exp(x) for x in row)) - float(row[label])
        assert losses[position].item() == pytest.approx(expected, abs=1e-4)
    assert losses.shape == (labels.numel(),)


def test_low_precision_logits_are_upcast():
    logits, labels = example(1)
    low = logits.bfloat16()
    assert token_losses(low, labels).dtype == torch.float32
    assert torch.equal(token_losses(low, labels), token_losses(low.float(), labels))
    assert lm_loss(low, labels, 3).dtype == torch.float32


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [torch.Tensor.long, torch.Tensor.float, int])
def test_equals_the_loss_of_bert_to_the_bit(seed, count):
    logits, labels = example(seed)
    items = count((labels != -100).sum())
    ours = loss_and_gradient(lambda x: lm_loss(x, labels, items), logits)
    berts = loss_and_gradient(lambda x: nn.CrossEntropyLoss()(x.view(-1, 211), labels.view(-1)), logits)
    assert torch.equal(ours[0], berts[0])
    assert torch.equal(ours[1], berts[1])


def test_parts_of_a_batch_add_up_to_the_batch():
    logits, labels = example(3)
    items = (labels != -100).sum()
    whole = lm_loss(logits, labels, items)
    parts = sum(lm_loss(x, y, items) for x, y in zip(logits, labels, strict=True))
    torch.testing.assert_close(parts, whole)
    assert (labels[0] != -100).sum() != (labels[1] != -100).sum()  # a mean of means would not do


def test_a_divisor_below_one_is_used():
    logits, labels = example(4)
    once, half = (lm_loss(logits, labels, torch.tensor(n)) for n in (1.0, 0.5))
    torch.testing.assert_close(half, 2 * once)


@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor(0.0)])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_masked_is_a_loss_of_zero(items, tokens):
    labels = torch.full((tokens,), -100)
    loss, gradient = loss_and_gradient(lambda x: lm_loss(x, labels, items), torch.randn(tokens, 7))
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(tokens, 7))
