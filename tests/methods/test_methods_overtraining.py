"""Which neurons are overtrained, and the warm-up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.methods.overtraining.subsets import SUBSETS, choose, subset_size, warm_up


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40),
    st.integers(0, 2**20),
    st.sampled_from(list(SUBSETS)),
    st.sampled_from([0.1, 0.29, 0.3, 0.5, 0.7, 1.0]),
)
def test_subsets(magnitudes, seed, subset, fraction):
    values = torch.tensor(magnitudes)
    available = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.7
    chosen = choose(values, available, subset, fraction, lambda: torch.Generator().manual_seed(seed)).tolist()
    candidates = [number for number in range(len(values)) if available[number]]
    if subset == "all":
        assert chosen == candidates
        return
    size = min(round(fraction * 100) * len(values) // 100, len(candidates))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == size
    assert set(chosen) <= set(candidates)
    left = [number for number in candidates if number not in chosen]
    if subset == "smallest" and left and chosen:
        assert max(magnitudes[i] for i in chosen) <= min(magnitudes[i] for i in left)
    if subset == "largest" and left and chosen:
        assert min(magnitudes[i] for i in chosen) >= max(magnitudes[i] for i in left)


def test_sizes_are_exact():
    assert subset_size(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert subset_size(0.5, 33) == 16


@given(st.integers(1, 200))
def test_the_warm_up_is_linear_over_a_tenth(batches):
    factors = [warm_up(number, batches) for number in range(1, batches + 1)]
    length = max(1, math.ceil(batches / 10))
    assert factors[:length] == pytest.approx([number / (length + 1) for number in range(1, length + 1)])
    assert factors[length:] == [1.0] * (batches - length)
