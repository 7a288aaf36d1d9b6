"""Two processes: a loss of the user's is as with the stock Trainer, and a resumed run gets the batches it would get."""

from pathlib import Path

import pytest
import torch
from support.scripts import run_script
from two_processes_run import EXAMPLES, MIDDLE, datasets_by_kind, loss_arguments, train_on_a_loss

pytestmark = pytest.mark.slow

LOSSES = ["a forward that adds a term", "a compute_loss", "a compute_loss that calls ours"]
RESUMED = ["a list", "grouped by length", "a dispatched stream", "a stream that every process reads"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = run_script(Path(__file__).with_name("two_processes_run.py"), folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_equal_runs(first: dict, second: dict) -> None:
    """Bit for bit."""
    assert first["losses"] == second["losses"]
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_ours_is_that_of_the_stock_trainer(name, found):
    for process in found:
        stock, ours = process["losses"][name]
        assert_equal_runs(stock, ours)
        assert stock["eval_loss"] == ours["eval_loss"]


def test_a_plain_loss_is_that_of_one_process_with_all_of_the_batch(found, tmp_path):
    from support.tiny_runs import masked_sentences, tiny_bert
    from transformers import Trainer

    args = loss_arguments(tmp_path, batch=8, accumulation=1)
    single = train_on_a_loss(Trainer, lambda: tiny_bert(0.0), object, masked_sentences(24), args)
    for process in found:
        ours = process["losses"]["plain"]
        assert ours["losses"] == pytest.approx(single["losses"], rel=1e-5)
        for name, value in single["weights"].items():
            torch.testing.assert_close(ours["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_the_second_epoch_equals_the_uninterrupted_one(name, found):
    for process in found:
        whole, resumed = process["data"][name]
        assert_equal_runs(whole, resumed)
        assert resumed["seen"] == whole["seen"][MIDDLE:]


@pytest.mark.parametrize("name", RESUMED)
def test_every_example_comes_once_in_every_epoch(name, found):
    rows = sorted(tuple(row["input_ids"]) for row in datasets_by_kind()[name][0]())
    steps = [process["data"][name][0]["seen"] for process in found]
    together = [row for both in zip(*steps, strict=True) for batch in both for row in batch]
    assert sorted(together[:EXAMPLES]) == rows
    assert sorted(together[EXAMPLES : 2 * EXAMPLES]) == rows


def test_what_accelerate_would_skip_wrongly_is_refused(found):
    for process in found:
        assert "dispatch_batches=True can't resume in the middle of an epoch" in process["data"]["a list, dispatched"]


def test_an_evaluation_counts_every_example_of_a_stream_once_or_is_refused(found):
    for process in found:
        losses = process["evaluations"]
        assert losses["dispatched"] == pytest.approx(losses["list"], rel=1e-6)
        assert "dispatch_batches=False can't evaluate on a stream with 2 processes" in losses["not dispatched"]
