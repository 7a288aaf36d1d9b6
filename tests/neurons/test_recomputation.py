"""Activations computed again in the backward pass, against a model that keeps them."""

import copy
import weakref

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.neurons.recomputation import Recomputation


class Watched:
    """Tells which inputs of the out-projections somebody still holds."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = find_feed_forwards(model)
        self._seen = []
        for block in self.blocks:
            block.out_slice.module.register_forward_pre_hook(lambda _, args: self._seen.append(weakref.ref(args[0])))

    def held(self) -> int:
        return sum(reference() is not None for reference in self._seen)


def tiny_bert(**overrides) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**config, intermediate_size=24, **overrides)).train()


def loss_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    torch.manual_seed(3)  # dropout
    return model(**inputs).logits.float().square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    expected, found = gradients(one), gradients(other)
    assert expected.keys() == found.keys()
    assert expected
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_same_to_the_bit_in_every_family(family):
    model = family.build().train()
    twin = copy.deepcopy(model)
    Recomputation(find_feed_forwards(twin))
    losses = [loss_of(each, family.inputs()) for each in (model, twin)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert_same_gradients(model, twin)


@pytest.mark.parametrize(
    ("activation", "kept"), [("gelu", 0), ("gelu_pytorch_tanh", 0), ("silu", 0), ("relu", 3), ("gelu_new", 3)]
)
def test_what_is_kept_until_the_backward_pass(activation, kept):
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    model = tiny_bert(hidden_act=activation)
    twin = copy.deepcopy(model)
    watched, watched_twin = Watched(model), Watched(twin)
    Recomputation(watched_twin.blocks)
    losses = [loss_of(each, inputs) for each in (model, twin)]
    assert (watched.held(), watched_twin.held()) == (3, kept)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, twin)
    del loss, losses
    assert (watched.held(), watched_twin.held()) == (0, 0)


def test_nothing_but_the_activations_is_replaced():
    """Projections as wide as the model, so that weights and activations have the same number of elements."""
    inputs = {"input_ids": torch.arange(16).view(1, 16)}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config).train()
    twin = copy.deepcopy(model)
    Recomputation(find_feed_forwards(twin))
    for each in (model, twin):
        loss_of(each, inputs).backward()
    assert_same_gradients(model, twin)


def test_under_autocast():
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    model = tiny_bert()
    twin = copy.deepcopy(model)
    watched = Watched(twin)
    Recomputation(watched.blocks)
    for each in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(each, inputs)
        if each is twin:
            assert watched.held() == 0
        loss.backward()
    assert_same_gradients(model, twin)


def test_second_derivatives():
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    model = tiny_bert(attn_implementation="eager")
    twin = copy.deepcopy(model)
    Recomputation(find_feed_forwards(twin))
    for each in (model, twin):
        weight = find_feed_forwards(each)[0].out_slice.parameter
        (first,) = torch.autograd.grad(loss_of(each, inputs), weight, create_graph=True)
        first.square().sum().backward()
    assert_same_gradients(model, twin)


def test_a_projection_that_fails_leaves_nothing_behind():
    model = tiny_bert()
    blocks = find_feed_forwards(model)
    Recomputation(blocks)
    whole = blocks[0].out_slice.module
    forward, whole.forward = whole.forward, lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loss_of(model, {"input_ids": torch.arange(6).view(1, 6)})
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    whole.forward = forward
    loss_of(model, {"input_ids": torch.arange(6).view(1, 6)}).backward()


def test_removed():
    model = tiny_bert()
    watched = Watched(model)
    Recomputation(watched.blocks).remove()
    loss = loss_of(model, {"input_ids": torch.arange(6).view(1, 6)})
    assert watched.held() == 3
    loss.backward()
