"""Which weights neuron i is made of: checked by what they do in the forward pass, not by where they lie."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_recycle import find_feed_forwards, neuron_magnitudes

PICKED = (0, 17, 23, 41)  # first, some, last


def logits_without_neuron(family, model, block_name, i):
    """The logits when coordinate `i` of the activation that enters the out-projection is set to zero. No hook reaches
    that of an expert, whose out-column, taken by hand, is set to zero instead."""
    if family.experts:
        out = family.matrices(model, block_name)[2]
        kept = out[:, i].clone()
        out[:, i] = 0
        logits = family.logits(model)
        out[:, i] = kept
        return logits

    def silence(module, arguments):
        hidden = arguments[0].clone()
        hidden[(slice(None), i) if isinstance(module, nn.Conv1d) else (..., i)] = 0
        return (hidden, *arguments[1:])

    handle = model.get_submodule(f"{block_name}.{family.out}").register_forward_pre_hook(silence)
    try:
        return family.logits(model)
    finally:
        handle.remove()


def test_any_one_part_at_zero_silences_just_that_neuron(family, perturb):
    """For a plain neuron in-row with bias, or out-column; for a gated one gate row, up row, or out-column: each alone
    at zero must give the very forward pass in which its activation is zero."""
    model = perturb(family.build())
    original = family.logits(model)
    for block in find_feed_forwards(model):
        matter = 0  # a ReLU may be off for every token
        for i in PICKED:
            index = torch.tensor([i])
            expected = logits_without_neuron(family, model, block.name, i)
            matter += not torch.allclose(expected, original, atol=1e-4)
            kept = block.read(index)
            # GPT-OSS multiplies the gate by up + 1.
            alone = [role for role in (*family.roles, "out") if (family.name, role) != ("gpt_oss", "up")]
            for roles in ((role, f"{role}.bias") for role in alone):
                block.write(index, {k: torch.zeros_like(v) if k in roles else v for k, v in kept.items()})
                torch.testing.assert_close(family.logits(model), expected, atol=2e-6, rtol=1e-5)
            block.write(index, kept)
        assert matter >= 2
    torch.testing.assert_close(family.logits(model), original, atol=0, rtol=0)


def test_read_gives_each_neurons_own_weights(family, perturb):
    model = perturb(family.build())
    for block in find_feed_forwards(model):
        values = block.read(torch.tensor(PICKED))
        for position, i in enumerate(PICKED):
            expected = dict(family.neuron_parts(model, block.name, i))
            assert values.keys() == expected.keys()
            for role, weights in expected.items():
                torch.testing.assert_close(values[role][position], weights, atol=0, rtol=0)


def test_write_changes_those_neurons_and_nothing_else(family, perturb):
    """Writes distinct numbers in an order that is not ascending, and compares every parameter of the model."""
    model, expected = perturb(family.build()), perturb(family.build())
    expected.load_state_dict(model.state_dict())
    order = torch.tensor([41, 3, 0])
    generator = torch.Generator().manual_seed(1)
    for block in find_feed_forwards(model):
        shapes = block.read(order)
        values = {role: torch.randn(v.shape, generator=generator) for role, v in shapes.items()}
        block.write(order, values)
        for position, i in enumerate(order.tolist()):
            for role, view in family.neuron_parts(expected, block.name, i):
                view.copy_(values[role][position])
        for role, back in block.read(order).items():
            assert torch.equal(back, values[role])
    for (name, parameter), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, reference), name


def test_read_is_a_copy(family):
    model = family.build()
    block = find_feed_forwards(model)[0]
    values = block.read(torch.tensor([2]))
    before = {role: v.clone() for role, v in values.items()}
    block.write(torch.tensor([2]), {role: v + 1 for role, v in values.items()})
    assert all(torch.equal(values[role], before[role]) for role in values)
    assert not any(v.requires_grad for v in values.values())


def naive_magnitude(family, model, block_name, i):
    """sqrt(Σ w_in² · Σ w_out²) with Python numbers, biases left out."""
    squares = {"in": 0.0, "out": 0.0}
    for role, weights in family.neuron_parts(model, block_name, i):
        if not role.endswith(".bias"):
            squares["out" if role == "out" else "in"] += sum(float(w) ** 2 for w in weights)
    return math.sqrt(squares["in"] * squares["out"])


def test_magnitudes_by_a_naive_loop(family, perturb):
    model = perturb(family.build())
    magnitudes = neuron_magnitudes(model)
    assert tuple(magnitudes) == family.block_names
    for name, values in magnitudes.items():
        assert values.shape == (42,)  # d_ff points, not d_model
        assert values.dtype == torch.float32
        assert not values.requires_grad
        expected = torch.tensor([naive_magnitude(family, model, name, i) for i in range(42)])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_magnitudes_are_float32_whatever_the_dtype(family, perturb, dtype):
    """Squares of 16-bit weights summed in 16 bits would be off by percents."""
    model = perturb(family.build()).to(dtype)
    for name, values in neuron_magnitudes(model).items():
        expected = torch.tensor([naive_magnitude(family, model, name, i) for i in range(42)])
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)


def test_block_magnitudes_equal_those_of_the_model(family):
    model = family.build()
    expected = neuron_magnitudes(model)
    for block in find_feed_forwards(model):
        assert torch.equal(block.magnitudes(), expected[block.name])


class Largest(TorchDispatchMode):
    """The most bytes that any newly allocated tensor took."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in [result] if isinstance(result, torch.Tensor) else []:
            if tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_model", "d_ff"), [(64, 16384), (1024, 1024)])
def test_magnitudes_copy_no_matrix(plain_net, dtype, d_model, d_ff):
    model = plain_net(d_model=d_model, d_ff=d_ff, layers=1).to(dtype)
    with Largest() as largest:
        neuron_magnitudes(model, "first -> second")
    matrix = d_model * d_ff * dtype.itemsize
    assert 0 < largest.bytes <= matrix / 2, f"a tensor of {largest.bytes} bytes beside a matrix of {matrix}"
