"""Linear layers by oneDNN, against torch's own in double precision."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_weights, losses, tiny_bert
from torch import Tensor, nn
from torch.nn import functional as F

from hf_recycle import onednn
from hf_recycle.onednn import OneDNNLinear, onednn_linear

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
    layer.__class__ = OneDNNLinear
    values = strided((*leading, inputs), order, generator).requires_grad_("input" not in frozen)
    wide = values.detach().double().requires_grad_("input" not in frozen)
    gradient = strided((*leading, outputs), order_of_gradient, generator)
    for each, entering, leaving in ((layer, values, gradient), (exact, wide, gradient.double())):
        each.weight.requires_grad_("weight" not in frozen)
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
    for each in (nn.Linear, OneDNNLinear):
        layer.__class__ = each
        (first,) = torch.autograd.grad(layer(values).square().sum(), layer.weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [layer.weight, values]))
    for expected, second in zip(*found, strict=True):
        torch.testing.assert_close(second, expected)


@needs_onednn
def test_infinite_numbers_stay_where_they_are():
    layer, values = nn.Linear(8, 4), torch.ones(3, 8)
    values[1, 2] = torch.inf
    expected = layer(values).isfinite()
    layer.__class__ = OneDNNLinear
    assert torch.equal(layer(values).isfinite(), expected)


def test_few_shapes_however_many_numbers_of_rows():
    shapes = {len(onednn._padded(torch.zeros(count, 1))) for count in range(1, 4097)}
    assert len(shapes) <= 8 * 12 + 1
    for count in (1, 17, 310, 2048):
        padded = onednn._padded(torch.ones(count, 2))
        assert count <= len(padded) < 1.125 * count + 1
        assert padded.sum() == 2 * count


@needs_onednn
@pytest.mark.parametrize("case", ["double", "bfloat16", "autocast", "a vector", "a small product", "no rows"])
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
        with onednn_linear(layer):
            found = layer(values)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert products == []


@needs_onednn
def test_compiled_code_is_the_compilers(products):
    layer, values = nn.Linear(8, 4), torch.randn(3, 8)
    expected = layer(values)
    with onednn_linear(layer):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(values), expected)
    torch.compiler.reset()
    assert products == []


@needs_onednn
def test_a_model_within_the_context_and_after(products):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    with onednn_linear(model):
        assert [type(layer) for layer in model] == [OneDNNLinear, Own]
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model[0]))
        copied[0].weight.data.zero_()
        assert copied[0](torch.ones(2, 4)).equal(copied[0].bias.expand(2, 4))
        assert loaded(torch.ones(2, 4)).equal(model[0](torch.ones(2, 4)))
    assert len(products) == 3
    assert [type(layer) for layer in model] == [nn.Linear, Own]


def watched_bert() -> nn.Module:
    """Notes the class of a linear layer at each forward pass."""
    model = tiny_bert()
    model.classes = []
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.register_forward_hook(lambda layer, *_: model.classes.append(type(layer)))
    return model


RECYCLING = {"recycle_steps": 3, "recycle_fraction": 0.2, "recycle_smooth_steps": 2}


@needs_onednn
def test_training(train, products):
    plain = train("plain", model=watched_bert(), onednn_linear=False, **RECYCLING)
    assert products == []
    found = train("found", model=watched_bert(), onednn_linear=True, **RECYCLING)
    assert {len(rows) for rows in products} == {3}
    assert set(plain.model.classes) == {nn.Linear}
    assert set(found.model.classes) == {OneDNNLinear}
    assert type(found.model.bert.encoder.layer[0].intermediate.dense) is nn.Linear
    assert losses(found) == pytest.approx(losses(plain), rel=1e-3)  # Adam blows the rounding of small gradients up


@needs_onednn
def test_interrupted_and_resumed(train):
    settings = {"onednn_linear": True, "save_strategy": "steps", "save_steps": 5, **RECYCLING}
    whole = train("whole", **settings)
    resumed = train("resumed", resume=f"{whole.args.output_dir}/checkpoint-5", **settings)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize(
    ("faster", "settings", "used"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"masked_head": False}, False),  # as the stock Trainer
        (True, {"masked_head": False, "midpoint_weight": 0.1}, True),
        (True, {"onednn_linear": False}, False),
        (True, {"torch_compile_backend": "eager"}, False),
    ],
)
@needs_onednn
def test_by_default_where_it_is_faster(faster, settings, used, train, monkeypatch):
    monkeypatch.setattr("hf_recycle.trainer.is_faster", lambda: faster)
    trainer = train(model=watched_bert(), max_steps=1, **settings)
    assert (OneDNNLinear in trainer.model.classes) == used


def test_a_torch_without_onednn(train, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="onednn_linear=True, but this PyTorch"):
        train(onednn_linear=True)


@pytest.mark.parametrize(
    ("facts", "capability", "faster"),
    [
        ("vendor_id : AuthenticAMD\ncpu family\t: 26\n", "AVX512", True),
        ("vendor_id : AuthenticAMD\ncpu family\t: 26\n", "AVX2", False),
        ("vendor_id : AuthenticAMD\ncpu family\t: 25\n", "AVX512", False),
        ("vendor_id : GenuineIntel\ncpu family\t: 26\n", "AVX512", False),
        ("CPU implementer : 0x41\n", "DEFAULT", False),
    ],
)
@needs_onednn
def test_where_it_is_faster(facts, capability, faster, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(onednn, "_CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn.is_faster.__wrapped__() == faster
