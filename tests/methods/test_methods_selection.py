"""Criteria and the choice itself, against `sorted`."""

import math

import made_up
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.methods.recycling.selection import CRITERIA, Signals, select, select_globally, select_in_each
from hf_recycle.utils.registry import Registry

# Few distinct values, so that ties are the rule.
VALUES = st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")])


@st.composite
def layers(draw, count=1):
    made = []
    for _ in range(count):
        neurons = draw(st.lists(st.tuples(VALUES, st.booleans()), min_size=1, max_size=15))
        scores, eligible = zip(*neurons, strict=True)
        made.append((list(scores), list(eligible)))
    return made


def reference(scores, eligible, k):
    """Sort (score, index) pairs of the eligible, take the first k; what is not a number comes last."""
    pairs = sorted((*rank(score), i) for i, (score, fine) in enumerate(zip(scores, eligible, strict=True)) if fine)
    return sorted(i for *_, i in pairs[:k])


def rank(score):
    return (1, 0.0) if math.isnan(score) else (0, score)


@given(layers(), st.integers(0, 20))
def test_select_takes_the_lowest_eligible(layer, k):
    ((scores, eligible),) = layer
    chosen = select(torch.tensor(scores), torch.tensor(eligible), k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == reference(scores, eligible, k)


@given(st.integers(1, 4).flatmap(lambda n: layers(count=n)), st.integers(0, 40))
def test_global_selection_by_brute_force(blocks, k):
    flat = sorted(
        (*rank(score), b, i)
        for b, (scores, eligible) in enumerate(blocks)
        for i, score in enumerate(scores)
        if eligible[i]
    )[:k]
    expected = [sorted(i for *_, owner, i in flat if owner == b) for b in range(len(blocks))]
    chosen = select_globally([torch.tensor(s) for s, _ in blocks], [torch.tensor(e) for _, e in blocks], k)
    assert [index.tolist() for index in chosen] == expected


@st.composite
def blocks_alike(draw):
    """Of one size, with one quota; few scores, so that some have ties, or few eligible neurons, and some do not."""
    size, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    neuron = st.tuples(st.integers(0, 9).map(float), st.sampled_from([True, True, True, False]))
    block = st.lists(neuron, min_size=size, max_size=size).map(lambda neurons: [*zip(*neurons, strict=True)])
    return [draw(block) for _ in range(count)], [draw(st.integers(0, size + 1))] * count


@given(blocks_alike() | st.tuples(layers(count=3), st.lists(st.integers(0, 8), min_size=3, max_size=3)))
def test_selection_in_each_block(given_blocks):
    blocks, quotas = given_blocks
    scores, eligible = ([torch.tensor(side) for side in sides] for sides in zip(*blocks, strict=True))
    found = select_in_each(scores, eligible, quotas)
    expected = [reference(*block, k) for block, k in zip(blocks, quotas, strict=True)]
    assert [index.tolist() for index in found] == expected


def test_small_cases():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
    everyone = torch.ones(4, dtype=torch.bool)
    assert select(scores, everyone, 0).tolist() == []
    assert select(scores, everyone, -1).tolist() == []
    assert select(scores, everyone, 1).tolist() == [1]
    assert select(scores, everyone, 9).tolist() == [0, 1, 2, 3]
    assert select(scores, ~everyone, 2).tolist() == []
    counted = scores.long()  # a criterion may count
    assert select(counted, counted != 1, 1).tolist() == [2]
    assert [index.tolist() for index in select_in_each([counted, -counted], [everyone, everyone], [1, 1])] == [[1], [0]]


def signals(magnitudes, seed=0):
    """With made-up statistics of the same seed."""
    d_ff = len(magnitudes)
    columns = torch.randn(d_ff, 4, generator=torch.Generator().manual_seed(seed))
    known = made_up.statistics(d_ff, 4, seed)
    return Signals(torch.tensor(magnitudes), lambda: torch.Generator().manual_seed(seed), lambda: columns, known)


def test_low_and_high_magnitude():
    magnitudes = [0.3, 0.1, 0.2, 0.4, 0.0]
    everyone = torch.ones(5, dtype=torch.bool)
    assert select(CRITERIA["low_magnitude"](signals(magnitudes)), everyone, 2).tolist() == [1, 4]
    assert select(CRITERIA["high_magnitude"](signals(magnitudes)), everyone, 2).tolist() == [0, 3]


@pytest.mark.parametrize(("name", "draws"), [("low_magnitude", 0), ("high_magnitude", 0), ("random", 1)])
def test_a_generator_is_made_for_those_that_draw(name, draws):
    made = []
    CRITERIA[name](Signals(torch.ones(3), lambda: made.append(torch.Generator()) or made[-1]))
    assert len(made) == draws


def test_random_is_uniform_and_ignores_magnitudes():
    """Each of 20 neurons is chosen in 1/4 of 4,000 draws: 1,000 ± 27 (one standard deviation)."""
    counts = torch.zeros(20)
    everyone = torch.ones(20, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        counts[select(CRITERIA["random"](Signals(torch.arange(20.0), lambda: generator)), everyone, 5)] += 1
    assert counts.sum() == 20_000
    assert (counts - 1000).abs().max() < 5 * 27.4


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_is_a_pure_function_of_its_signals(name):
    """The same again for the same generator state; the global generator is neither used nor changed."""
    magnitudes = [0.3, 0.1, 0.2, 0.4, 0.0, 0.7]
    state = torch.get_rng_state()
    given_values = signals(magnitudes, seed=3)
    first = CRITERIA[name](given_values)
    assert given_values.magnitudes.tolist() == pytest.approx(magnitudes)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(CRITERIA[name](signals(magnitudes, seed=3)), first)
    torch.set_rng_state(state)
    assert first.shape == (6,)
    assert first.isfinite().all()


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_has_a_line_of_help(name):
    assert f"{name}: " in CRITERIA.describe()
    assert CRITERIA[name].__doc__.strip()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown selection criterion 'lowest': choose one of low_magnitude, high"):
        CRITERIA["lowest"]


def test_a_registry_is_filled_by_decoration():
    registry = Registry("thing")

    @registry.register
    def one():
        """the one"""

    assert list(registry) == ["one"]
    assert registry["one"] is one
    assert registry.describe() == "one: the one"
