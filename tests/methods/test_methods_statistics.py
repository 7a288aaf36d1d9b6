"""Criteria that look at activations, and folds, against naive computations on a block of known activations."""

import math

import pytest
import torch

from hf_recycle.methods.folding import damped, least_squares_shares, mean_share
from hf_recycle.methods.recycling.selection import CRITERIA, Signals, select, surgeon_scores
from hf_recycle.methods.registry import GRADIENTS, STATISTICS, by_weights, needs, needs_of

TOKENS, D_FF, D_MODEL = 300, 12, 5


@pytest.fixture
def layer():
    """Correlated activations of a ReLU layer with a dead neuron and a constant one, gradients, out-columns."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = (normal(TOKENS, 6) @ normal(6, D_FF) + normal(TOKENS, D_FF)).relu()
    h[:, 4], h[:, 7] = 0.0, 2.0
    return {"h": h, "g": normal(TOKENS, D_FF), "v": normal(D_FF, D_MODEL), "w": normal(D_FF, 3)}


def statistics(layer):
    h, g = layer["h"], layer["g"]
    return {
        "mean": h.mean(0),
        "mean_abs": h.abs().mean(0),
        "second_moment": h.square().mean(0),
        "cross_moment": (h.T @ h / len(h)).float(),
        "taylor": (g * (h - h.mean(0))).square().mean(0),
        "in_gradient": layer["w"].abs().mean(1),
    }


def signals(layer, name, **more):
    known = {key: value for key, value in statistics(layer).items() if key in needs_of(CRITERIA[name])}
    return Signals(torch.ones(D_FF), lambda: None, lambda: layer["v"], known, **more)


def rms(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


NAIVE = {
    "dormant": lambda h, g, v, w, i: mean_of(map(abs, h[i])) / mean_of(mean_of(map(abs, row)) for row in h),
    "contribution": lambda h, g, v, w, i: mean_of(map(abs, h[i])) * mean_of(map(abs, v[i])),
    "fisher": lambda h, g, v, w, i: mean_of((b * (a - mean_of(h[i]))) ** 2 for a, b in zip(h[i], g[i], strict=True)),
    "gradient": lambda h, g, v, w, i: mean_of(map(abs, w[i])) / mean_of(mean_of(map(abs, row)) for row in w),
    "flap": lambda h, g, v, w, i: mean_of((a - mean_of(h[i])) ** 2 for a in h[i]) * sum(b * b for b in v[i]),
    "wanda": lambda h, g, v, w, i: rms(h[i]) * sum(map(abs, v[i])),
    "activation": lambda h, g, v, w, i: rms(h[i]),
}


def mean_of(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("name", NAIVE)
def test_a_criterion_against_its_formula(layer, name):
    h, g = layer["h"].T.tolist(), layer["g"].T.tolist()
    expected = [NAIVE[name](h, g, layer["v"].tolist(), layer["w"].tolist(), i) for i in range(D_FF)]
    found = CRITERIA[name](signals(layer, name))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found.std() > 0


def test_all_criteria_with_statistics_are_tested():
    assert {*NAIVE, "obs", *by_weights(CRITERIA)} == set(CRITERIA)
    assert list(by_weights(CRITERIA)) == ["low_magnitude", "high_magnitude", "random"]


@pytest.mark.parametrize("name", ["dormant", "gradient"])
def test_a_layer_without_activity_is_dormant_as_a_whole(layer, name):
    layer["h"].zero_()
    layer["w"].zero_()
    assert CRITERIA[name](signals(layer, name)).tolist() == [0.0] * D_FF


def output_error(layer, kept):
    """Mean squared error of the best linear stand-in for the block's output from neurons `kept`, with the damping as
    noise of its variance on every activation: ‖Vᵀh − Wᵀh_K‖², minimised by solving for W."""
    c, v = damped(statistics(layer)["cross_moment"]), layer["v"]
    k = torch.tensor(kept)
    w = torch.linalg.solve(c[k][:, k], c[k] @ v)
    return float(torch.trace(v.T @ c @ v) - torch.trace(w.T @ c[k] @ v))


def test_the_surgeon_removes_one_at_a_time_what_costs_least():
    """Against refitting the others from scratch for each candidate."""
    generator = torch.Generator().manual_seed(8)
    for _ in range(4):
        h = torch.randn(60, D_FF, generator=generator, dtype=torch.float64) @ torch.randn(
            D_FF, D_FF, generator=generator, dtype=torch.float64
        )
        layer = {"h": h, "g": h, "w": h.T, "v": torch.randn(D_FF, D_MODEL, generator=generator, dtype=torch.float64)}
        removed, left, costs = [], list(range(D_FF)), []
        for _ in range(5):
            before = output_error(layer, left) if len(left) < D_FF else 0.0
            errors = {i: output_error(layer, [j for j in left if j != i]) for i in left if i != 3}
            index = min(errors, key=errors.get)
            removed.append(index)
            costs.append(errors[index] - before)
            left.remove(index)
        eligible = torch.ones(D_FF, dtype=torch.bool)
        eligible[3] = False
        scores = surgeon_scores(statistics(layer)["cross_moment"], layer["v"], eligible, 5)
        assert select(scores, eligible, 5).tolist() == sorted(removed)
        assert scores[removed].argsort().tolist() == [0, 1, 2, 3, 4], "in the order in which they went"
        expected = torch.tensor(costs, dtype=torch.float64).cummax(0).values
        torch.testing.assert_close(scores[removed], expected, rtol=1e-5, atol=1e-7)


def test_obs_scores_all_neurons_when_none_are_wanted(layer):
    known = signals(layer, "obs")
    inverse = torch.linalg.inv(damped(known.statistics["cross_moment"]))
    expected = [float(layer["v"][i].square().sum() / inverse[i, i]) for i in range(D_FF)]
    torch.testing.assert_close(CRITERIA["obs"](known), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["dead", "twins"])
def test_a_layer_without_variety_makes_no_singular_matrix(layer, kind):
    """Of twins, one takes over what the other did, but for the damping."""
    layer["h"][:] = 0.0 if kind == "dead" else layer["h"][:, :1]
    assert CRITERIA["obs"](signals(layer, "obs", count=4)).isfinite().all()
    shares = least_squares_shares(statistics(layer)["cross_moment"], layer["v"], torch.tensor([1]), torch.tensor([2]))
    expected = torch.zeros(1, D_MODEL) if kind == "dead" else layer["v"][[1]]
    torch.testing.assert_close(shares, expected.double(), rtol=0.011, atol=0)


def test_the_mean_fold_keeps_the_mean_output(layer):
    removed = torch.tensor([2, 7, 9])
    share = mean_share(layer["h"].mean(0), layer["v"], removed)
    without = layer["h"].clone()
    without[:, removed] = 0
    torch.testing.assert_close((without @ layer["v"] + share).mean(0), (layer["h"] @ layer["v"]).mean(0))


def test_the_least_squares_fold_is_the_ridge_regression_of_what_is_gone(layer):
    """Against `lstsq` with the damping as extra rows."""
    removed, kept = torch.tensor([0, 5, 8]), torch.tensor([1, 2, 3, 6, 9, 10, 11])
    moments = layer["h"].T @ layer["h"] / TOKENS
    shares = least_squares_shares(moments, layer["v"], removed, kept)
    damping = 0.01 * float(moments.diagonal().mean())
    rows = torch.cat([layer["h"][:, kept], math.sqrt(damping * TOKENS) * torch.eye(len(kept), dtype=torch.float64)])
    targets = torch.cat([layer["h"][:, removed] @ layer["v"][removed], torch.zeros(len(kept), D_MODEL).double()])
    torch.testing.assert_close(shares, torch.linalg.lstsq(rows, targets).solution, rtol=1e-6, atol=1e-9)


def test_the_surgeon_and_the_fold_agree_on_what_is_lost():
    """The error after folding is the sum of what the surgeon said each one costs."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(80, D_FF, generator=generator, dtype=torch.float64).cumsum(1)
    layer = {"h": h, "g": h, "w": h.T, "v": torch.randn(D_FF, D_MODEL, generator=generator, dtype=torch.float64)}
    everyone = torch.ones(D_FF, dtype=torch.bool)
    c = statistics(layer)["cross_moment"]
    scores = surgeon_scores(c, layer["v"], everyone, 4)
    gone = select(scores, everyone, 4)
    kept = torch.tensor([i for i in range(D_FF) if i not in gone.tolist()])
    error = layer["v"].clone()
    error[kept] = -least_squares_shares(c, layer["v"], gone, kept)
    loss = torch.trace(error.T @ damped(c) @ error)
    assert float(loss) == pytest.approx(output_error(layer, kept.tolist()), rel=1e-6)


def test_needs_are_declared_by_known_names():
    with pytest.raises(ValueError, match="unknown statistic 'median': choose some of mean, mean_abs"):
        needs("mean", "median")
    assert needs_of(CRITERIA["flap"]) == {"mean", "second_moment"}
    assert needs_of(CRITERIA["random"]) == frozenset()
    assert set(STATISTICS) > GRADIENTS
