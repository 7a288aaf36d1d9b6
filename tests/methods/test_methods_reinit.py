"""New weights: their statistics, their sources, and what every registered reinitialization must hold to."""

import math

import pytest
import torch

from hf_recycle import find_feed_forwards
from hf_recycle.methods.recycling.births import REINITIALIZATIONS, Options
from hf_recycle.methods.recycling.selection import is_immune
from hf_recycle.neurons.table import BlockView
from hf_recycle.utils.seeds import generator_for

FAMILIES = ("bert", "gpt2", "modernbert", "llama")
INDEX = torch.arange(3, 203)


@pytest.fixture
def view(family_named, request):
    """Block 0 of a model whose matrices have each its own mean and std, far from any initialisation."""
    family = family_named(request.param)
    model = family.build(d_model=32, d_ff=256)
    block = find_feed_forwards(model)[0]
    everyone = torch.arange(256)
    values = block.read(everyone)
    generator = torch.Generator().manual_seed(0)
    for number, (role, old) in enumerate(values.items(), start=1):
        values[role] = 0.5 * number + 0.1 * number * torch.randn(old.shape, generator=generator)
    block.write(everyone, values)
    made = BlockView(model, block)
    made.model = model  # a view holds it weakly
    return made


def draw(view, name, index=INDEX, seed=0, **options):
    return REINITIALIZATIONS[name](view, index, torch.Generator().manual_seed(seed), Options(**options))


over_families = pytest.mark.parametrize("view", FAMILIES, indirect=True)


@over_families
def test_matched_normal_matches_each_matrix(view):
    """Mean and std within 5 standard errors of those of all weights of that matrix: gate and up apart."""
    current = view.read(torch.arange(256))
    drawn = draw(view, "matched_normal")
    fresh = draw(view, "initial")
    assert drawn.keys() == current.keys()
    for role, values in drawn.items():
        if role.endswith(".bias"):
            assert torch.equal(values, fresh[role])  # zero in these families
            continue
        n, std = values.numel(), float(current[role].std())
        assert float(values.mean()) == pytest.approx(float(current[role].mean()), abs=5 * std / math.sqrt(n))
        assert float(values.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        # Normal: the fourth moment of a standardised normal is 3.
        assert float(((values - values.mean()) / values.std()).pow(4).mean()) == pytest.approx(3, abs=0.25)


@over_families
def test_matched_normal_takes_all_neurons_into_account(view):
    """The recycled ones too: the matrix as it is."""
    outlier = {role: v + 100 for role, v in view.read(torch.tensor([0])).items()}
    view.block.write(torch.tensor([0]), outlier)
    drawn = draw(view, "matched_normal", index=torch.tensor([0]).repeat(2000))
    for role in view.weight_roles:
        current = view.read(torch.arange(256))[role]
        assert float(drawn[role].std()) == pytest.approx(float(current.std()), rel=0.03)


def nearest(values, candidates):
    """For each row of values, which candidate row is closest."""
    return torch.cdist(values.double(), candidates.double()).argmin(dim=1)


@over_families
def test_copy_noise_takes_one_source_for_every_part(view):
    current = view.read(torch.arange(256))
    drawn = draw(view, "copy_noise")
    sources = {role: nearest(drawn[role], current[role]) for role in view.weight_roles}
    source = sources["out"]
    for role in view.weight_roles:
        assert torch.equal(sources[role], source)
        noise = drawn[role] - current[role][source]
        std = 0.05 * float(current[role].std())
        n = noise.numel()
        assert float(noise.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert float(noise.mean()) == pytest.approx(0, abs=5 * std / math.sqrt(n))
    for role in view.bias_roles:
        assert torch.equal(drawn[role], current[role][source])
    assert not torch.isin(source, INDEX).any()
    # 200 draws with replacement from 56 others reach nearly all of them: 56 · (1 − e^(−200/56)) = 54.4.
    assert len(source.unique()) > 45


@over_families
def test_copy_noise_scale(view):
    exact = draw(view, "copy_noise", noise_scale=0.0)
    current = view.read(torch.arange(256))
    source = nearest(exact["out"], current["out"])
    assert all(torch.equal(exact[role], current[role][source]) for role in current)
    wide = draw(view, "copy_noise", noise_scale=0.2)
    noise = wide["out"] - current["out"][nearest(wide["out"], current["out"])]
    assert float(noise.std()) == pytest.approx(0.2 * float(current["out"].std()), rel=0.05)


@over_families
def test_copy_noise_when_every_neuron_is_recycled(view):
    drawn = draw(view, "copy_noise", index=torch.arange(256))
    assert all(values.isfinite().all() and len(values) == 256 for values in drawn.values())


@over_families
@pytest.mark.parametrize("name", list(REINITIALIZATIONS))
def test_every_reinitialization(view, name):
    """A finite value of the right shape for each part; the model only read; all randomness from the generator."""
    before = {key: value.clone() for key, value in view.model.state_dict().items()}
    state = torch.get_rng_state()
    for count in (0, 1, 5):
        index = torch.tensor([9, 2, 7, 0, 255])[:count]
        drawn = draw(view, name, index=index)
        shapes = {role: values.shape for role, values in view.read(index).items()}
        assert {role: values.shape for role, values in drawn.items()} == shapes
        assert all(values.isfinite().all() for values in drawn.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())
    first, again, other = draw(view, name), draw(view, name), draw(view, name, seed=1)
    assert all(torch.equal(first[role], again[role]) for role in view.weight_roles)
    assert not all(torch.equal(first[role], other[role]) for role in view.weight_roles)
    assert f"{name}: " in REINITIALIZATIONS.describe()


# ---- immunity and seeds, the two smallest methods ----


def test_immunity_lasts_exactly_n_phases():
    last = torch.tensor([0, 1, 2, 3, 4, 5])
    assert is_immune(last, 6, 0).tolist() == [False] * 6
    assert is_immune(last, 6, 1).tolist() == [False, False, False, False, False, True]
    assert is_immune(last, 6, 3).tolist() == [False, False, False, True, True, True]
    assert is_immune(last, 6, 100).tolist() == [False, True, True, True, True, True]


def test_seeds_depend_on_each_part_and_on_nothing_else():
    base = (1, 2, 3, "select")
    others = [(0, 2, 3, "select"), (1, 3, 3, "select"), (1, 2, 4, "select"), (1, 2, 3, "reinit"), (2, 1, 3, "select")]
    draws = [torch.rand(4, generator=generator_for(*key)).tolist() for key in (base, *others)]
    assert len({tuple(d) for d in draws}) == len(draws)
    torch.rand(1)
    assert torch.rand(4, generator=generator_for(*base)).tolist() == draws[0]
    generator_for(2**63, 10**9, 1000, "x")
