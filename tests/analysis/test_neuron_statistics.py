"""Dead and duplicate neurons against their definitions, neuron by neuron."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_recycle.analysis.duplicates as duplicates_module
from hf_recycle import find_feed_forwards
from hf_recycle.analysis.blocks import Thresholds, block_statistics
from hf_recycle.analysis.duplicates import duplicates
from hf_recycle.analysis.scan import in_memory, scan


def naive_duplicates(weights, out, threshold):
    """By the definition: an earlier neuron whose in-row and out-column point the same way."""
    rows = torch.cat(weights, dim=1).double()
    columns = out.T.double()
    found = []
    for i in range(len(rows)):
        for j in range(i):
            norms = [float(v.norm()) for v in (rows[i], rows[j], columns[i], columns[j])]
            if not all(norms):
                continue
            cosine = (rows[i] @ rows[j] / (norms[0] * norms[1]) + columns[i] @ columns[j] / (norms[2] * norms[3])) / 2
            if cosine >= threshold:
                found.append(i)
                break
    return found


@pytest.mark.parametrize("rows", [512, 5], ids=["at once", "five rows at a time"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5-gated", "gpt2"])
def test_duplicates_by_definition(family_named, perturb, name, rows, monkeypatch):
    monkeypatch.setattr(duplicates_module, "_ROWS", rows)
    monkeypatch.setattr(duplicates_module, "_ENTRIES", 40)
    family = family_named(name)
    model = perturb(family.build())
    block = find_feed_forwards(model)[0]
    index = torch.arange(12)
    values = block.read(index)
    generator = torch.Generator().manual_seed(3)
    for role, value in values.items():
        # Scaled, slightly and rather different copies, and one with an out-column turned round.
        noise = torch.randn(value.shape, generator=generator) * value.std()
        factor = {"out": 0.2}.get(role, 5.0)
        value[4:6] = value[0:2] * factor
        value[6:8] = value[0:2] + 0.05 * noise[6:8]
        value[8:10] = value[0:2] + 0.4 * noise[8:10]
        value[10] = -value[0] if role == "out" else value[0]
        value[11] = 0 if role == "out" else value[0]
    block.write(index + 20, values)
    weights, _, out = family.matrices(model, block.name)
    expected = naive_duplicates(weights, out, 0.99)

    found = duplicates(block, in_memory, scan(block, in_memory), 0.99)

    assert found.tolist() == expected
    assert {24, 25, 26, 27} <= set(expected)
    assert not {28, 29, 30, 31} & set(expected)


@given(threshold=st.floats(0.5, 0.9999), seed=st.integers(0, 10**6))
def test_duplicates_at_any_threshold(plain_block, threshold, seed):
    block = plain_block
    generator = torch.Generator().manual_seed(seed)
    values = block.read(torch.arange(block.num_neurons))
    for value in values.values():
        value.normal_(generator=generator)
        for i in range(10):
            value[10 + i] = value[i] + i / 10 * torch.randn(value[i].shape, generator=generator)
    block.write(torch.arange(block.num_neurons), values)
    expected = naive_duplicates([values["in"]], values["out"].T, threshold)
    assert duplicates(block, in_memory, scan(block, in_memory), threshold).tolist() == expected


@pytest.fixture(scope="module")
def plain_block():
    linear = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 6))
    return find_feed_forwards(linear, "0 -> 2")[0]


def test_all_neurons_alike(plain_block):
    values = plain_block.read(torch.zeros(20, dtype=torch.int64))
    plain_block.write(torch.arange(20), values)
    found = duplicates(plain_block, in_memory, scan(plain_block, in_memory), 1.0)
    assert found.tolist() == list(range(1, 20))


def test_dead_and_zero_neurons(plain_net):
    block = find_feed_forwards(plain_net(d_ff=50))[0]
    values = block.read(torch.arange(6))
    values["out"][0] = 0  # pruned
    values["in"][1] = 0  # constant
    values["out"][2] *= 1e-4
    values["in"][3] *= 0.05
    values["out"][4] *= 1e-15
    values["in"][4] *= 1e-15
    block.write(torch.arange(6), values)

    found = block_statistics(block, in_memory, Thresholds(dead=0.01))

    assert found.dead.tolist() == [0, 1, 2, 4]
    assert found.zero == 2
    magnitudes = block.magnitudes().numpy()
    assert np.allclose(found.magnitudes, magnitudes, rtol=1e-6)
    assert found.mean == pytest.approx(magnitudes.mean())
    assert found.variation == pytest.approx(magnitudes.std() / magnitudes.mean())
    assert found.quantiles["0.5"] == pytest.approx(np.median(magnitudes))
    counts, edges = (found.to_json()["histogram"][key] for key in ("counts", "edges"))
    assert sum(counts) == 50
    assert counts == np.histogram(found.magnitudes.astype(np.float64), edges)[0].tolist()


def test_a_block_of_zeros(plain_net):
    block = find_feed_forwards(plain_net())[0]
    for parameter in block.parameters():
        parameter.data.zero_()
    found = block_statistics(block, in_memory, Thresholds())
    assert (found.zero, len(found.dead), len(found.duplicate), found.bimodal) == (20, 20, 0, False)
    assert found.variation == 0
