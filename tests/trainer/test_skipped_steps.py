"""A step that the gradient scaler skips is as if its batch had never been. Real scalers, real overflows."""

from pathlib import Path

import pytest
import torch
from support.overflow import ARGUMENTS, POISONED, poison, samples, use_scaler
from support.tiny_runs import assert_same_weights, losses, masked_sentences, tiny_bert

from hf_recycle import RecyclingTrainer

BATCH = 4
METHODS = {
    "plain": {"recycle_steps": 3, "recycle_fraction": 0.1},
    "immunity": {
        "recycle_steps": 1,
        "recycle_fraction": 0.1,
        "recycle_immunity": 2,
        "recycle_reinit": "matched_normal",
        "recycle_fraction_schedule": "linear",
        "recycle_end": 8,
    },
    "smooth": {"recycle_steps": 3, "recycle_fraction": 0.2, "recycle_smooth_steps": 4, "recycle_selection": "random"},
    "midpoint": {"midpoint_weight": 5.0, "midpoint_distance": "l2"},
    "pruning": {
        "prune_fraction": 0.5,
        "prune_start": 2,
        "prune_end": 8,
        "prune_steps": 2,
        "prune_selection": "random",
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
    },
    "pruning alone": {"prune_fraction": 0.5, "prune_start": 1, "prune_end": 7, "prune_steps": 2},
}


@pytest.fixture
def run(arguments):
    def train(how: str, resume: int | None = None, optim: str = "adamw_torch", autocast: bool = False, **settings):
        folder = how if resume is None else f"{how}-resumed"
        trainer = RecyclingTrainer(
            model=tiny_bert(dropout=0.0),
            args=arguments(folder, fp16=True, optim=optim, **ARGUMENTS[how], **settings),
            train_dataset=samples(masked_sentences, BATCH, how),
        )
        use_scaler(trainer, autocast=autocast)
        poison(trainer, POISONED if how == "skip" else ())
        checkpoint = Path(trainer.args.output_dir).with_name(how) / f"checkpoint-{resume}"
        trainer.train(resume_from_checkpoint=None if resume is None else str(checkpoint))
        return trainer

    return train


def phases_of(trainer) -> list[dict]:
    return [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] in ("phase", "pruning")]


def state_of(trainer) -> dict[str, torch.Tensor]:
    return trainer.neuron_table().state_dict()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("method", METHODS)
def test_bit_for_bit(method, optim, run):
    """A fused optimizer is called for steps that it skips, others are not."""
    skipping, reference = run("skip", optim=optim, **METHODS[method]), run("without", optim=optim, **METHODS[method])
    assert skipping.accelerator.scaler.get_scale() == reference.accelerator.scaler.get_scale() / 2 ** len(POISONED)
    assert_same_weights(skipping, reference)
    assert [loss for step, loss in enumerate(losses(skipping), 1) if step not in POISONED] == losses(reference)
    if method == "midpoint":
        return
    found, expected = state_of(skipping), state_of(reference)
    found = {key: values for key, values in found.items() if not key.endswith("/skipped_steps") or "trainer" in key}
    assert found.keys() == expected.keys()
    assert int(found.pop("trainer/skipped_steps")) == len(POISONED)
    assert int(expected.pop("trainer/skipped_steps")) == 0
    for key, values in expected.items():
        if not key.endswith("last_step"):
            assert torch.equal(found[key], values), key
    # The history counts as the Trainer does: optimizer step 3 is its step 4, and so on.
    taken = [step for step in range(1, 13) if step not in POISONED]
    assert phases_of(reference)
    assert phases_of(skipping) == [row | {"step": taken[row["step"] - 1]} for row in phases_of(reference)]


@pytest.mark.parametrize("at", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_resume_after_skipped_steps(at, run):
    settings = METHODS["smooth"] | {"midpoint_weight": 5.0, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = run("skip", **settings), run("skip", resume=at, **settings)
    assert_same_weights(whole, resumed)
    assert losses(whole) == losses(resumed)
    assert all(torch.equal(values, state_of(resumed)[key]) for key, values in state_of(whole).items())


def test_fp16_autocast(run):
    """In fp16 a scale does round what is smallest; a large epsilon, so that Adam does not blow that up."""
    settings = METHODS["smooth"] | {"adam_epsilon": 1e-3}
    skipping, reference = (run(how, autocast=True, **settings) for how in ("skip", "without"))
    assert int(state_of(skipping)["trainer/skipped_steps"]) == len(POISONED)
    for block, counts in reference.neuron_table().counts.items():
        assert counts.sum() > 0
        assert torch.equal(counts, skipping.neuron_table().counts[block])
    for (name, a), b in zip(skipping.model.named_parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)


def test_pruning_reaches_its_share_all_the_same(run):
    skipping = run("skip", prune_fraction=0.5, prune_start=2, prune_steps=4)
    assert [row["step"] for row in phases_of(skipping)] == [9, 9, 12, 12]  # optimizer step 6, and the last
    assert all(state.pruned.sum() == 16 for state in skipping.neuron_table().states)


def test_no_phase_falls_on_the_last_step_of_training(run):
    """Optimizer step 9 of `recycle_steps=3` is step 12 of the Trainer, the last."""
    skipping = run("skip", **METHODS["plain"])
    assert skipping.state.global_step == 12
    assert {row["step"] for row in phases_of(skipping)} == {4, 9}
