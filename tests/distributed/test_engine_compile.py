"""A compiled model on two processes, gradients accumulated, gives the weights of one plain process."""

import pytest
import torch
from test_engines import assert_same_outcome, launch, outcome

COMPILED = ["smooth", "midpoint"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    words = ["off:compile=full", "off:compile", *(f"{method}:compile" for method in COMPILED)]
    reference = launch("single", tmp_path_factory.mktemp("one"), ["off", *COMPILED], processes=1)
    return reference, launch("ddp", tmp_path_factory.mktemp("two"), words, processes=2)


@pytest.mark.long
@pytest.mark.parametrize("method", ["off", *COMPILED])
def test_same_as_one_plain_process(method, folders):
    one, two = folders
    expected, found = outcome(one, method), outcome(two, f"{method}-compiled")
    assert found[0]["engine"] == "MULTI_CPU"
    assert found[0]["graphs"] > 0
    assert not expected[0]["graphs"]
    assert_same_outcome(expected, found)


@pytest.mark.long
def test_neither_the_masked_head_nor_a_method_adds_a_graph_or_a_break(folders):
    def counted(run):
        result = torch.load(folders[1] / run / "result.pt", weights_only=False)
        return result["graphs"], result["graph_breaks"]

    full = counted("off-compiled=full")
    assert {method: counted(f"{method}-compiled") for method in ["off", *COMPILED]} == dict.fromkeys(
        ["off", *COMPILED], full
    )
