"""New weights: their statistics, their sources, and what every registered reinitialization must hold to."""

import math

import made_up
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
    return birth(view, name, index, seed, **options).values


def birth(view, name, index=INDEX, seed=0, **options):
    options = {"statistics": made_up.statistics(256, 32, seed=5)} | options
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
    first, again, other = (draw(view, name, index=INDEX[:40], seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[role], again[role]) for role in view.weight_roles)
    assert not all(torch.equal(first[role], other[role]) for role in view.weight_roles)
    assert f"{name}: " in REINITIALIZATIONS.describe()


# ---- births that keep what the block computes ----


@over_families
def test_zero_out_is_as_long_as_the_others_and_adds_nothing(view):
    drawn = draw(view, "zero_out")
    others = torch.tensor([i for i in range(256) if i not in INDEX.tolist()])
    rows = torch.cat([drawn[role] for role in view.weight_roles if role != "out"], dim=1)
    torch.testing.assert_close(rows.norm(dim=1), view.norms()[0][others].mean().expand(200), rtol=1e-5, atol=0)
    assert drawn["out"].abs().max() == 0
    fresh = draw(view, "initial")
    for role in view.bias_roles:
        assert torch.equal(drawn[role], fresh[role])


def output(values, x):
    """What neurons add to a block's output for inputs `(tokens, d_model)`: ungated with ReLU, gated with SiLU."""
    if "gate" in values:
        gate = x @ values["gate"].T + values.get("gate.bias", 0)
        h = torch.nn.functional.silu(gate) * (x @ values["up"].T + values.get("up.bias", 0))
    else:
        h = (x @ values["in"].T + values.get("in.bias", 0)).relu()
    return h @ values["out"]


@over_families
def test_split_keeps_what_the_sources_added_and_makes_no_twins(view):
    index = torch.arange(3, 43)
    x = torch.randn(17, 32, generator=torch.Generator().manual_seed(2)).double()
    born = birth(view, "split", index)
    assert not set(born.edited.tolist()) & set(index.tolist())
    before = {role: values.double() for role, values in view.read(born.edited).items()}
    after = [{role: values.double() for role, values in side.items()} for side in (born.values, born.edits)]
    torch.testing.assert_close(sum(output(side, x) for side in after), output(before, x), rtol=1e-5, atol=1e-4)
    for role in before:
        if role != "out":
            assert torch.equal(after[0][role], before[role])
            assert torch.equal(after[1][role], before[role])
    # Not one a multiple of the other, or both would learn the same.
    cosine = torch.cosine_similarity(after[0]["out"], after[1]["out"], dim=1).abs()
    assert (cosine < 0.9999).all()
    # The sources are the largest of those that are not reborn.
    magnitudes = view.block.magnitudes().clone()
    magnitudes[index] = 0
    assert sorted(born.edited.tolist()) == sorted(magnitudes.topk(40).indices.tolist())
    assert torch.equal(born.together(index)[0], torch.cat([index, born.edited]))


@over_families
def test_split_shares_only_with_those_it_may(view):
    others = torch.arange(200, 230)
    assert sorted(birth(view, "split", INDEX[:30], others=others).edited.tolist()) == others.tolist()
    with pytest.raises(ValueError, match="recycle_reinit='split' has 30 neurons to share with 31 newborns"):
        birth(view, "split", INDEX[:31], others=others)


@over_families
def test_gradmax_gives_the_out_columns_the_largest_gradient(view):
    """Of a linear neuron: the gradient of its out-column is G w, where G is the sum of δ xᵀ."""
    descent = made_up.statistics(256, 32, seed=5)["descent"].double()
    drawn = draw(view, "gradmax", index=INDEX[:3])
    assert drawn["out"].abs().max() == 0
    role = "up" if view.block.gated else "in"
    directions = torch.nn.functional.normalize(drawn[role].double(), dim=1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(3).double(), rtol=0, atol=1e-5)
    gains = (descent @ directions.T).norm(dim=0)
    torch.testing.assert_close(gains, torch.linalg.svdvals(descent)[:3], rtol=1e-5, atol=0)
    assert len(draw(view, "gradmax", index=INDEX[:60])[role]) == 60, "more than there are directions"


@over_families
def test_sample_is_on_at_the_tokens_that_were_drawn(view):
    """A fifth as long as the others; where tokens run out, from the initial distribution."""
    inputs = made_up.statistics(256, 32, seed=5)["token_inputs"]
    drawn, fresh = draw(view, "sample", index=INDEX[:40]), draw(view, "zero_out", index=INDEX[:40])
    others = torch.tensor([i for i in range(256) if i not in INDEX[:40].tolist()])
    rows = [role for role in view.weight_roles if role != "out"]
    norms = torch.cat([drawn[role] for role in rows], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, 0.2 * view.norms()[0][others].mean().expand(40), rtol=1e-5, atol=0)
    for role in rows:
        cosine = torch.cosine_similarity(drawn[role][:32], inputs, dim=1)
        torch.testing.assert_close(cosine, torch.ones(32), rtol=1e-5, atol=0)
        assert torch.cosine_similarity(drawn[role][32:], fresh[role][32:], dim=1).min() > 0.99999
    for role in view.bias_roles:
        assert drawn[role][:32].abs().max() == 0
    assert drawn["out"].abs().max() == 0
    assert not view.is_dictionary


def test_sample_gives_a_dictionary_unit_out_columns():
    class Autoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(6, 20), torch.nn.Linear(20, 6)
            self.threshold = torch.nn.Parameter(torch.zeros(20))

    model = Autoencoder()
    view = BlockView(model, find_feed_forwards(model, "encoder -> decoder")[0])
    assert view.is_dictionary
    inputs = made_up.statistics(20, 6)["token_inputs"]
    drawn = draw(view, "sample", torch.tensor([4, 9, 2]), statistics={"token_inputs": inputs})
    torch.testing.assert_close(drawn["out"], torch.nn.functional.normalize(inputs[:3], dim=1))
    model.readout = torch.nn.Linear(6, 6)
    assert not view.is_dictionary


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
