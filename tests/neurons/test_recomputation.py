"""Activations computed again in the backward pass, against a model that keeps them."""

import copy
import pickle
import weakref
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from support.causal import llama
from support.families import FAMILIES
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM

from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.speed.recomputation import recomputing_forwards
from hf_recycle.utils.forwards import replaced_forwards


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


def recomputed(model: nn.Module):
    blocks = find_feed_forwards(model, "fc1 -> fc2" if isinstance(model, Block) else None)
    return replaced_forwards(recomputing_forwards(blocks, {}))


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
    with recomputed(twin):
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
    with recomputed(twin):
        losses = [loss_of(each, inputs) for each in (model, twin)]
    assert (watched.held(), watched_twin.held()) == (3, kept)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, twin)
    del loss, losses
    assert (watched.held(), watched_twin.held()) == (0, 0)


def test_a_gated_block_keeps_its_activations():
    """Beside its pre-activations, the out-projection's input is one of two factors."""
    model = llama()
    watched = Watched(model)
    with recomputed(model):
        loss = loss_of(model, {"input_ids": torch.arange(12).view(2, 6)})
    assert watched.held() == 2
    del loss


def test_nothing_but_the_activations_is_replaced():
    """Projections as wide as the model, so that weights and activations have the same number of elements."""
    inputs = {"input_ids": torch.arange(16).view(1, 16)}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config).train()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with recomputed(twin):
            loss_of(each, inputs).backward()
    assert_same_gradients(model, twin)


def test_under_autocast():
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    model = tiny_bert()
    twin = copy.deepcopy(model)
    watched = Watched(twin)
    for each in (model, twin):
        with recomputed(twin), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(each, inputs)
        if each is twin:
            assert watched.held() == 0
        loss.backward()
    assert_same_gradients(model, twin)


def test_second_derivatives():
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    model = tiny_bert(attn_implementation="eager")
    twin = copy.deepcopy(model)
    for each in (model, twin):
        weight = find_feed_forwards(each)[0].out_slice.parameter
        with recomputed(twin):
            loss = loss_of(each, inputs)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        first.square().sum().backward()
    assert_same_gradients(model, twin)


class Block(nn.Module):
    """A feed-forward block, and what may lie between its activation function and its out-projection."""

    def __init__(self, between=lambda values: values) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.between = nn.Linear(8, 24), nn.Linear(24, 8), between

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.between(F.gelu(self.fc1(values))))


def scale_unseen(values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return values.mul_(2)  # autograd takes it for the GELU's result still


@pytest.mark.parametrize(
    "between",
    [
        F.relu_,
        scale_unseen,
        lambda values: F.dropout(values, 0.5, inplace=True),
        lambda values: F.dropout(values, 0.0, inplace=True),
        lambda values: values.T.contiguous().T,
        lambda values: values.chunk(2, 0)[1],
    ],
    ids=["relu_", "scaled without autograd", "dropout_", "no dropout_", "transposed", "half"],
)
def test_what_is_changed_in_between(between):
    model = Block(between)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        torch.manual_seed(1)
        with recomputed(twin):
            result = each(torch.linspace(-2, 2, 48).view(6, 8))
        result.square().sum().backward()
    assert_same_gradients(model, twin)


def transposed(self, values: torch.Tensor) -> torch.Tensor:
    return (self.weight @ values.T).T + self.bias


def test_a_projection_that_computes_in_another_way():
    """What it saves lies where the activations lie, and is read column by column."""

    class Own(nn.Linear):
        forward = transposed

    model = Block()
    model.fc2.__class__ = Own
    twin = copy.deepcopy(model)
    kept_forward = copy.deepcopy(model)
    kept_forward.fc2.forward = MethodType(transposed, kept_forward.fc2)
    for each in (model, twin, kept_forward):
        with recomputed(twin), recomputed(kept_forward):
            each(torch.linspace(-2, 2, 48).view(6, 8)).square().sum().backward()
    assert_same_gradients(model, twin)
    assert_same_gradients(model, kept_forward)
    assert "forward" in vars(kept_forward.fc2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_checkpointed(reentrant):
    model = Block()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        calls = []
        each.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        with recomputed(twin):
            values = torch.linspace(-2, 2, 48).view(6, 8).requires_grad_()
            result = checkpoint(each, values, use_reentrant=reentrant)
            assert len(calls) == 1
            result.square().sum().backward()
        assert len(calls) == 2
    assert_same_gradients(model, twin)


def test_hooks_on_saved_tensors_of_the_user_see_what_they_would_see_without():
    model = Block()
    seen = []
    for context in (nullcontext(), recomputed(model)):
        shapes = []
        with (
            context,
            saved_tensors_hooks(lambda saved, shapes=shapes: shapes.append(saved.shape) or saved, torch.clone),
        ):
            model(torch.ones(6, 8)).sum().backward()
        seen.append(shapes)
    assert seen[0] == seen[1]


def test_transforms_of_functions():
    model = Block()
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, torch.linspace(-2, 2, 48).view(6, 8)).square().sum()

    expected = torch.func.grad(loss)(weights)
    with recomputed(model):
        found = torch.func.grad(loss)(weights)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the module", "its forward", "in a wrapper"])
def test_a_compiled_layer_is_compiled_once(how):
    torch.compiler.reset()
    counters.clear()
    model = Block()
    twin = nn.Sequential(copy.deepcopy(model))
    if how == "the module":
        twin[0].compile(backend="aot_eager")
    elif how == "its forward":
        twin[0].forward = torch.compile(twin[0].forward, backend="aot_eager")
    else:
        twin[0] = torch.compile(twin[0], backend="aot_eager")
    inner = getattr(twin[0], "_orig_mod", twin[0])
    forwards = recomputing_forwards(find_feed_forwards(inner, "fc1 -> fc2"), {})
    values = torch.linspace(-2, 2, 48).view(6, 8)
    for _ in range(3):
        model(values).square().sum().backward()
        with replaced_forwards(forwards):
            twin(values).square().sum().backward()
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (1, 0)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.compiler.reset()


def test_copies_made_within_the_context_keep_everything():
    model = Block()
    with recomputed(model):
        copied, pickled = copy.deepcopy(model.fc2), pickle.dumps(model.fc2)
    assert b"hf_recycle" not in pickled
    values = torch.linspace(-2, 2, 48).view(2, 24)
    for each in (copied, pickle.loads(pickled)):
        with torch.no_grad():
            each.weight.zero_()
        assert torch.equal(each(values), each.bias.expand(2, 8))
    assert not torch.equal(model.fc2(values), model.fc2.bias.expand(2, 8))


def test_a_projection_that_fails_leaves_nothing_behind():
    model = Block()
    handle = model.fc2.register_forward_hook(lambda *_: 1 / 0)
    with recomputed(model), pytest.raises(ZeroDivisionError):
        model(torch.ones(6, 8))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert "forward" not in vars(model.fc2)
    handle.remove()
    model(torch.ones(6, 8)).sum().backward()
