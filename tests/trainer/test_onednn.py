"""Linear layers by oneDNN, against torch's own in double precision."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_runs import assert_same_weights, losses
from torch import Tensor, nn
from torch.nn import functional as F

from hf_recycle.speed import onednn
from hf_recycle.speed.onednn import onednn_forwards
from hf_recycle.utils.forwards import replaced_forwards

needs_onednn = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch is without oneDNN")


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch):
    monkeypatch.setattr(onednn, "_LEAST_WORK", 0)
    monkeypatch.setattr(onednn, "_COLUMNS_AT_ONCE", 16)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the products that oneDNN computes."""
    seen = []
    multiply = onednn.multiply

    def watched(rows, weight, bias=None):
        seen.append((*rows.shape, len(weight)))
        return multiply(rows, weight, bias)

    monkeypatch.setattr(onednn, "multiply", watched)
    return seen


def by_onednn(model: nn.Module):
    return replaced_forwards(onednn_forwards(model))


def strided(shape: tuple[int, ...], order: str, generator: torch.Generator) -> Tensor:
    """Numbers that lie in memory in this order: "rows", "columns" (a transposed matrix), "gaps"."""
    if order == "columns":
        return torch.randn(shape[::-1], generator=generator).permute(*range(len(shape) - 1, -1, -1))
    width = 2 * shape[-1] if order == "gaps" else shape[-1]
    return torch.randn(*shape[:-1], width, generator=generator)[..., : shape[-1]]


ORDERS = st.sampled_from(["rows", "columns", "gaps"])


@needs_onednn
@given(
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 50),
    bias=st.booleans(),
    order=ORDERS,
    order_of_gradient=ORDERS,
    frozen=st.sets(st.sampled_from(["input", "weight"]), max_size=1),
)
def test_forward_and_backward(leading, inputs, outputs, bias, order, order_of_gradient, frozen):
    generator = torch.Generator().manual_seed(inputs)
    layer = nn.Linear(inputs, outputs, bias=bias)
    exact = copy.deepcopy(layer).double()
    values = strided((*leading, inputs), order, generator).requires_grad_("input" not in frozen)
    wide = values.detach().double().requires_grad_("input" not in frozen)
    gradient = strided((*leading, outputs), order_of_gradient, generator)
    for each, entering, leaving in ((layer, values, gradient), (exact, wide, gradient.double())):
        each.weight.requires_grad_("weight" not in frozen)
        with by_onednn(each):
            each.result = each(entering)
        if each.result.requires_grad:
            each.result.backward(leaving)
    # A rounding of each of the numbers of about 1 that are summed.
    allowed = {"rtol": 1e-5, "atol": torch.finfo(torch.float32).eps * max(gradient.numel() // outputs, inputs, outputs)}
    torch.testing.assert_close(layer.result.double(), exact.result, **allowed)
    assert layer.result.is_contiguous()
    pairs = [(values, wide), *zip(layer.parameters(), exact.parameters(), strict=True)]
    for found, expected in pairs:
        assert (found.grad is None) == (expected.grad is None)
        if found.grad is not None:
            assert found.grad.dtype == torch.float32
            torch.testing.assert_close(found.grad.double(), expected.grad, **allowed)


@needs_onednn
def test_second_derivatives():
    layer, values = nn.Linear(5, 7).double().float(), torch.randn(3, 5, requires_grad=True)
    found = []
    for context in (nullcontext(), by_onednn(layer)):
        with context:
            result = layer(values)
        (first,) = torch.autograd.grad(result.square().sum(), layer.weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [layer.weight, values]))
    for expected, second in zip(*found, strict=True):
        torch.testing.assert_close(second, expected)


@needs_onednn
def test_infinite_numbers_stay_where_they_are():
    layer, values = nn.Linear(8, 4), torch.ones(3, 8)
    values[1, 2] = torch.inf
    expected = layer(values).isfinite()
    with by_onednn(layer):
        assert torch.equal(layer(values).isfinite(), expected)


def test_few_shapes_however_many_numbers_of_rows():
    shapes = {len(onednn._padded(torch.zeros(count, 1))) for count in range(1, 4097)}
    assert len(shapes) <= 8 * 12 + 1
    for count in (1, 17, 310, 2048):
        padded = onednn._padded(torch.ones(count, 2))
        assert count <= len(padded) < 1.125 * count + 1
        assert padded.sum() == 2 * count


@needs_onednn
@pytest.mark.parametrize("case", ["double", "bfloat16", "autocast", "a vector", "a small product", "no rows", "vmap"])
def test_what_stays_with_torch(case, products, monkeypatch):
    layer, values = nn.Linear(8, 4), torch.randn(3, 8)
    if case in ("double", "bfloat16"):
        layer, values = (each.to(getattr(torch, case)) for each in (layer, values))
    if case == "a vector":
        values = values[0]
    if case == "no rows":
        values = values[:0]
    if case in ("a small product", "no rows"):
        monkeypatch.setattr(onednn, "_LEAST_WORK", 3 * 8 * 4 + (case == "a small product"))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        expected = F.linear(values, layer.weight, layer.bias)
        with by_onednn(layer):
            found = torch.func.vmap(layer)(values[:, None])[:, 0] if case == "vmap" else layer(values)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert products == []


@needs_onednn
def test_compiled_code_is_the_compilers(products):
    layer, values = nn.Linear(8, 4), torch.randn(3, 8)
    expected = layer(values)
    with by_onednn(layer):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(values), expected)
    torch.compiler.reset()
    assert products == []


@needs_onednn
@pytest.mark.parametrize("rows", [3, 17])  # the latter are padded
def test_the_result_can_be_changed_in_place_and_so_can_what_is_not_needed(rows):
    layer, values = nn.Linear(8, 4), torch.randn(2, rows, 8)
    layer.weight.requires_grad_(False)
    found = []
    for context in (nullcontext(), by_onednn(layer)):
        with context:
            entering = values.clone().requires_grad_()
            copied = entering * 1
            result = layer(copied).div_(3.0).relu_()
            copied.zero_()  # of no use to the gradient, as the weights are frozen
            result.square().sum().backward()
        found.append((result.detach(), entering.grad))
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock)


@needs_onednn
def test_copies_and_pickles_made_within_the_context_are_torchs(products):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4))
    model[2].forward = lambda values: values  # a user's
    with by_onednn(model):
        copied, pickled = copy.deepcopy(model[0]), pickle.dumps(model[0])
        model(torch.ones(2, 4))
        assert len(products) == 1
        for each in (copied, pickle.loads(pickled)):
            assert type(each) is nn.Linear
            each.weight.data.zero_()
            assert each(torch.ones(2, 4)).equal(each.bias.expand(2, 4))
    assert b"hf_recycle" not in pickled
    assert len(products) == 1
    assert [set(vars(layer)) & {"forward"} for layer in model] == [set(), set(), {"forward"}]


@needs_onednn
def test_a_forward_that_someone_puts_there_meanwhile_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with by_onednn(model):
        model[0].forward = "theirs"
    assert model[0].forward == "theirs"
    assert "forward" not in vars(model[1])


RECYCLING = {"recycle_steps": 3, "recycle_fraction": 0.2, "recycle_smooth_steps": 2}


@needs_onednn
def test_training(train, products):
    plain = train("plain", **RECYCLING)
    assert products == []  # off unless asked for
    found = train("found", onednn_linear=True, **RECYCLING)
    assert {len(rows) for rows in products} == {3}
    assert losses(found) == pytest.approx(losses(plain), rel=1e-3)  # Adam blows the rounding of small gradients up


@pytest.mark.slow
@needs_onednn
def test_what_is_compiled_is_left_to_the_compiler(train, products):
    train(onednn_linear=True, max_steps=1, torch_compile_backend="eager")
    assert products == []


@needs_onednn
def test_interrupted_and_resumed(train):
    settings = {"onednn_linear": True, "save_strategy": "steps", "save_steps": 5, **RECYCLING}
    whole = train("whole", **settings)
    resumed = train("resumed", resume=f"{whole.args.output_dir}/checkpoint-5", **settings)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)


def test_a_torch_without_onednn(train, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="onednn_linear=True, but this PyTorch"):
        train(onednn_linear=True)
