"""Criteria and births that take gradients of their own: as on one process, or refused where an engine has them."""

import pytest
from matrix import GRADIENT_METHODS
from test_engines import assert_same_outcome, launch, outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gradients")


@pytest.fixture(scope="module")
def expected(folder):
    return launch("single", folder / "single", list(GRADIENT_METHODS), 1)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def found(request, folder):
    return launch(request.param, folder / request.param, list(GRADIENT_METHODS), 2)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_gradients_of_extra_batches(method, found, expected):
    assert_same_outcome(outcome(expected, method), outcome(found, method))
    assert all(row["recycled"] for row in outcome(found, method)[0]["history"])


def test_deepspeed_is_refused_before_training(folder):
    message = launch("zero2", folder / "zero2", ["gradient"], 2, fails=True)
    assert "recycle_selection='gradient' needs gradients, which DeepSpeed takes over: use DDP or FSDP2" in message
