"""The closed form of the midpoint loss in all its variants, against autograd through the loss as it is written."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recycle.methods.midpoint import MidpointLoss

VARIANTS = list(itertools.product(("l1", "l2"), ("mean", "median"), (False, True), (False, True)))


def naive_loss(ins, out, distance, center, log, below_only, included):
    """Neuron by neuron. ins: one or two (n, width); out: (n, width)."""
    values = []
    for i in range(len(out)):
        if included[i]:
            magnitude = torch.sqrt(sum((w[i] ** 2).sum() for w in ins) * (out[i] ** 2).sum())
            values.append(torch.log(magnitude) if log else magnitude)
    numbers = sorted(v.item() for v in values)
    middle = sum(numbers) / len(numbers) if center == "mean" else numbers[(len(numbers) - 1) // 2]
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        if not below_only or value.item() < middle:
            difference = value - middle
            total = total + (difference.abs() if distance == "l1" else difference**2)
    return total


def weights(n, gated, seed=0):
    """Neurons whose norms differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.05, 3, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    made = [
        (torch.randn(n, width, generator=generator, dtype=torch.float64) * scale[:, None]).requires_grad_()
        for width in ((5, 5, 4) if gated else (5, 4))
    ]
    return made[:-1], made[-1]


def slopes(method, ins, out, included):
    in_norm = torch.stack([w.detach().norm(dim=1) for w in ins]).norm(dim=0)
    return method.slopes(in_norm, out.detach().norm(dim=1), included)


@pytest.mark.parametrize("n", [11, 12])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("distance", "center", "log", "below_only"), VARIANTS)
def test_loss_and_gradient(distance, center, log, below_only, gated, n):
    ins, out = weights(n, gated)
    for excluded in ((), (0, 4, 5)):
        included = torch.ones(n, dtype=torch.bool)
        included[list(excluded)] = False
        expected = naive_loss(ins, out, distance, center, log, below_only, included)
        gradients = torch.autograd.grad(expected, [*ins, out])
        loss, by_in, by_out = slopes(MidpointLoss(distance, center, log, below_only), ins, out, included)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        for weight, gradient in zip(ins, gradients, strict=False):
            torch.testing.assert_close(by_in[:, None] * weight.detach(), gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(by_out[:, None] * out.detach(), gradients[-1], rtol=1e-10, atol=1e-12)
        assert gradients[-1].abs().max() > 1e-3, "the reference must not be trivial"
        assert all(float(g[list(excluded)].abs().max()) == 0 for g in gradients if excluded)


@pytest.mark.parametrize(("distance", "center", "log", "below_only"), VARIANTS)
@pytest.mark.parametrize("dead", ["in", "out", "both"])
def test_a_neuron_of_norm_zero_gets_no_gradient_and_no_nan(distance, center, log, below_only, dead):
    ins, out = weights(9, gated=False)
    with torch.no_grad():
        if dead != "out":
            ins[0][3] = 0
        if dead != "in":
            out[3] = 0
    everyone = torch.ones(9, dtype=torch.bool)
    loss, by_in, by_out = slopes(MidpointLoss(distance, center, log, below_only), ins, out, everyone)
    assert loss.isfinite()
    assert by_in.isfinite().all()
    assert by_out.isfinite().all()
    assert by_in[3] == by_out[3] == 0
    # The others feel it in the center: as a magnitude of zero, which has no logarithm.
    included = everyone.clone()
    included[3] = not log
    reference = naive_loss(ins, out, distance, center, log, below_only, included)
    torch.testing.assert_close(loss, reference.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("distance", "center", "log", "below_only"), VARIANTS)
def test_no_neuron_at_all(distance, center, log, below_only):
    ins, out = weights(5, gated=False)
    nobody = torch.zeros(5, dtype=torch.bool)
    loss, by_in, by_out = slopes(MidpointLoss(distance, center, log, below_only), ins, out, nobody)
    assert loss == 0
    assert not by_in.any()
    assert not by_out.any()


def test_by_hand():
    """Magnitudes 1, 2, 6: mean 3, median 2."""
    norms = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    everyone = torch.ones(3, dtype=torch.bool)
    assert MidpointLoss().slopes(norms, one, everyone)[0] == 2 + 1 + 3
    assert MidpointLoss(below_only=True).slopes(norms, one, everyone)[0] == 2 + 1
    assert MidpointLoss(distance="l2", center="median").slopes(norms, one, everyone)[0] == 1 + 0 + 16
    loss = MidpointLoss(center="median", log=True).slopes(norms, one, everyone)[0]
    assert float(loss) == pytest.approx(math.log(2) + math.log(3))
    # Large neurons shrink, small ones grow.
    _, by_in, by_out = MidpointLoss().slopes(norms, one, everyone)
    assert by_in.tolist() == pytest.approx([-1, -1 / 2, 1 / 6])
    assert by_out.tolist() == pytest.approx([-1, -2, 6])


SIZES = st.one_of(
    st.sampled_from([0.0, 1e-45, 1e-40, 1e-23, 1e-19, 2e-19, 1e-6, 1e6, 2e19, 3e38, math.inf, math.nan]),
    st.floats(0, 1e6, width=32),
)


@pytest.mark.parametrize(("distance", "center", "log", "below_only"), VARIANTS)
@given(data=st.data())
@settings(max_examples=30)
def test_weights_of_any_size(distance, center, log, below_only, data):
    """What is out of range is left alone and disturbs no other; what is not grows ten times at most with the log."""
    norms = data.draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=6))
    in_norm, out_norm = torch.tensor([*norms, (0.5, 0.5), (1.0, 2.0)], dtype=torch.float32).T
    method = MidpointLoss(distance, center, log, below_only)
    _, *slopes = method.slopes(in_norm, out_norm, torch.ones(len(in_norm), dtype=torch.bool))
    for slope, norm in zip(slopes, (in_norm, out_norm), strict=True):
        assert slope.isfinite().all()
        assert slope[~((norm > 1e-19) & (norm < 2e19))].eq(0).all()
        factor = method.factor(slope, 1e-3)
        assert factor.isfinite().all()
        assert not log or factor.abs().max() <= 10
