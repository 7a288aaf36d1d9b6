"""Fresh weights come from the very distribution that building the model anew draws from."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_recycle import find_feed_forwards
from hf_recycle.neurons.initial import FreshModules, InitialDistribution

D_MODEL, D_FF = 32, 256
DRAWN = 400


def sample(model, position=0, n=DRAWN, seed=1, **kwargs):
    block = find_feed_forwards(model)[position]
    return InitialDistribution(FreshModules(model), block).sample(n, torch.Generator().manual_seed(seed), **kwargs)


def kolmogorov_smirnov(a: torch.Tensor, b: torch.Tensor) -> float:
    """The two-sample statistic, scaled so that it exceeds 2.5 with probability 1e-5 if both distributions are one."""
    a, b = np.sort(a.numpy().ravel()), np.sort(b.numpy().ravel())
    grid = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)).max()
    return float(distance * math.sqrt(len(a) * len(b) / (len(a) + len(b))))


def test_as_in_a_newly_built_model(family):
    """Std within 5 standard errors, mean within 5, the whole distribution by Kolmogorov-Smirnov, for every role; the
    old model's own weights are far away (std 3), so none of them can leak."""
    torch.manual_seed(0)
    model, new = (family.build(d_model=D_MODEL, d_ff=D_FF) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 3.0)
    for position, name in enumerate(family.block_names):
        drawn = sample(model, position, seed=position)
        weights, biases, out = family.matrices(new, name)
        reference = dict(zip(family.roles, weights, strict=True)) | {"out": out.T}
        reference |= {f"{r}.bias": b for r, b in zip(family.roles, biases, strict=True) if b is not None}
        assert drawn.keys() == reference.keys()
        for role, expected in reference.items():
            values = drawn[role]
            assert values.shape == (DRAWN, *expected.shape[1:])
            if role.endswith(".bias"):
                # No family of the table draws its biases.
                assert torch.equal(expected, torch.zeros(D_FF))
                assert torch.equal(values, torch.zeros(DRAWN))
                continue
            error = 1 / math.sqrt(2 * expected.numel()) + 1 / math.sqrt(2 * values.numel())
            assert abs(values.std() / expected.std() - 1) < 5 * error, (name, role)
            assert abs(values.mean() - expected.mean()) < 5 * 2 * error * expected.std(), (name, role)
            assert kolmogorov_smirnov(values, expected) < 2.5, (name, role)


@pytest.mark.parametrize(
    ("name", "role", "std"),
    [
        # The traps of bare layers: 1.0, 0.02 and 0.02 there.
        ("t5-relu", "in", D_MODEL**-0.5),
        ("t5-relu", "out", D_FF**-0.5),
        ("t5-gated", "gate", D_MODEL**-0.5),
        ("mt5", "up", D_MODEL**-0.5),
        ("mt5", "out", D_FF**-0.5),
        ("gpt2", "in", 0.02),
        ("gpt2", "out", 0.02 / math.sqrt(2 * 12)),
        ("modernbert", "out", 0.02 / math.sqrt(2 * 12)),
        ("modernbert", "gate", 0.02),
        ("bert", "in", 0.02),
    ],
)
def test_formulas_of_families_that_scale_by_shape_or_depth(family_named, name, role, std):
    model = family_named(name).build(d_model=D_MODEL, d_ff=D_FF, layers=12)
    values = sample(model)[role]
    if name == "modernbert":
        # Truncated at 2 std, which leaves a std of 0.8796 of it.
        assert float(values.abs().max()) <= 2 * std * (1 + 1e-6)
        std *= 0.8796
    assert float(values.std()) == pytest.approx(std, rel=0.03)


def test_rows_are_independent_of_one_another(family):
    """No neuron twice, and gate and up are different draws."""
    drawn = sample(family.build(), n=50)
    for role, values in drawn.items():
        if not role.endswith(".bias"):
            assert len(values.unique(dim=0)) == 50
    if family.gated:
        assert not torch.equal(drawn["gate"], drawn["up"])


def test_random_states_are_untouched_and_draws_repeat(family):
    model = family.build()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = sample(model, seed=7)
    torch.rand(3)
    second = sample(model, seed=7)
    third = sample(model, seed=8)
    for role in first:
        assert torch.equal(first[role], second[role])
        assert role.endswith(".bias") or not torch.equal(first[role], third[role])
    torch.set_rng_state(before[0])
    sample(model, seed=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_the_model_is_only_read(family):
    model = family.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_initializer_range_of_the_config_counts(family_named):
    model = family_named("bert").build(d_model=D_MODEL, d_ff=D_FF)
    model.config.initializer_range = 0.5
    assert float(sample(model)["in"].std()) == pytest.approx(0.5, rel=0.03)


def test_more_neurons_than_the_block_has(family_named):
    """ModernBERT's initialiser is not elementwise: several fresh blocks are needed there."""
    for name, role in (("bert", "in"), ("modernbert", "gate")):
        values = sample(family_named(name).build(d_ff=42), n=100)[role]
        assert values.shape == (100, 16)
        assert len(values.unique(dim=0)) == 100


def test_selected_roles_only(family_named):
    drawn = sample(family_named("llama").build(), roles=["gate.bias"])
    assert list(drawn) == ["gate.bias"]


def test_a_plain_module_is_drawn_as_its_layers_draw_themselves(plain_net):
    """nn.Linear: uniform in ±1/sqrt(fan_in), bias too; the fan-in of the two projections differs."""
    drawn = sample(plain_net(d_model=16, d_ff=100), n=2000)
    for role, bound in (("in", 1 / 4), ("in.bias", 1 / 4), ("out", 1 / 10)):
        values = drawn[role]
        assert float(values.abs().max()) <= bound
        assert float(values.abs().max()) == pytest.approx(bound, rel=5e-3)
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)


class OrthogonalConfig(PretrainedConfig):
    model_type = "orthogonal-test"


class OrthogonalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)


class OrthogonalModel(PreTrainedModel):
    """Its initialiser does not work element by element."""

    config_class = OrthogonalConfig

    def __init__(self, config):
        super().__init__(config)
        self.block = OrthogonalBlock()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, gain=2.0)
            nn.init.constant_(module.bias, 0.25)


def test_an_initialiser_that_is_not_elementwise_is_run_afresh():
    model = OrthogonalModel(OrthogonalConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    state = torch.get_rng_state()
    drawn = sample(model, n=24)
    assert torch.equal(torch.get_rng_state(), state)
    # 24 rows of an orthogonal (24, 8) matrix with gain 2: columns orthogonal, of norm 2.
    torch.testing.assert_close(drawn["in"].T @ drawn["in"], 4 * torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn["out"].T @ drawn["out"], 4 * torch.eye(8), atol=1e-5, rtol=0)
    assert torch.equal(drawn["in.bias"], torch.full((24,), 0.25))
    again, other = sample(model, n=24), sample(model, n=24, seed=2)
    assert torch.equal(drawn["in"], again["in"])
    assert not torch.equal(drawn["in"], other["in"])


def test_two_draws_of_one_distribution_differ():
    model = OrthogonalModel(OrthogonalConfig())
    distribution = InitialDistribution(FreshModules(model), find_feed_forwards(model)[0])
    generator = torch.Generator().manual_seed(0)
    first, second = (distribution.sample(3, generator)["in"] for _ in range(2))
    assert not torch.equal(first, second)


class Uninitialised(nn.Linear):
    def reset_parameters(self):
        pass


def test_layers_that_nothing_initialises_are_refused():
    model = nn.Sequential(Uninitialised(6, 9), nn.ReLU(), Uninitialised(9, 6))
    with pytest.raises(ValueError, match="recycle_reinit: nothing in the model initialises 'in'"):
        sample(model)


def test_the_innermost_pretrained_model_decides(family_named):
    """In a composite model each part is initialised by its own class."""
    whole = nn.Module()
    whole.a, whole.b = (family_named(name).build(d_model=D_MODEL, d_ff=D_FF) for name in ("bert", "t5-relu"))
    bert, t5 = sample(whole, 0), sample(whole, 2)
    assert float(bert["in"].std()) == pytest.approx(0.02, rel=0.03)
    assert float(t5["in"].std()) == pytest.approx(D_MODEL**-0.5, rel=0.03)
