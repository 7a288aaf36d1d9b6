"""A run that has taken all its steps is not trained on: it comes to the end that it has, or would have had."""

from pathlib import Path

import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, sentences

from hf_recycle import RecyclingHistory

SETTINGS = {
    **{"save_strategy": "steps", "save_steps": 4, "max_steps": 14, "logging_steps": 3, "recycle_steps": 3},
    **{"recycle_fraction": 0.1, "recycle_smooth_steps": 4},
}


def ending(trainer) -> dict:
    """What was reported at the end, but for what a clock says."""
    row = trainer.state.log_history[-1]
    return {name: value for name, value in row.items() if not name.endswith(("runtime", "per_second"))}


@pytest.mark.slow
def test_a_finished_run_resumed_ends_as_it_had_ended(train, said):
    """An epoch has 12 steps, so that the last one is not over; steps 13 and 14 were not logged."""
    whole = train(evaluation=sentences(8, seed=9), **SETTINGS)
    end, expected = ending(whole), whole.evaluate()["eval_loss"]
    again = train(evaluation=sentences(8, seed=9), resume=True, **SETTINGS)
    assert any("run that is finished: it has taken 14 of 14 steps" in text for text in said())
    assert_same_weights(whole, again)
    assert again.state.global_step == 14
    assert losses(again) == losses(whole)
    assert ending(again) == pytest.approx(end, rel=1e-6)
    assert again.state.log_history[-1]["train_runtime"] > 0.5 * whole.state.log_history[-2]["train_runtime"]
    assert again.evaluate()["eval_loss"] == expected
    assert sorted(path.name for path in Path(again.args.output_dir).glob("check*")) == [
        f"checkpoint-{step}" for step in (12, 14, 4, 8)
    ]
    again.save_model()
    saved = RecyclingHistory.from_pretrained(again.args.output_dir)
    assert saved.stats["step"] == 14
    last = RecyclingHistory.from_pretrained(f"{again.args.output_dir}/checkpoint-14")
    assert saved.events.astype(str).equals(last.events.astype(str))


@pytest.mark.slow
def test_steps_beyond_the_end_count_as_finished_and_a_larger_max_steps_goes_on(train):
    whole = train(**SETTINGS)
    shorter = train(resume=True, **(SETTINGS | {"max_steps": 10}))
    assert shorter.state.global_step == 14
    assert_same_weights(whole, shorter)
    assert train(resume=True, **(SETTINGS | {"max_steps": 16})).state.global_step == 16


@pytest.mark.slow
def test_the_best_model_of_a_finished_run_is_loaded(train):
    settings = SETTINGS | {
        **{"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": True},
        **{"metric_for_best_model": "loss", "learning_rate": 5e-2, "evaluation": sentences(8, seed=9)},
    }
    whole = train(**settings)
    best = Path(whole.state.best_model_checkpoint)
    assert best.name != "checkpoint-14"
    again = train(resume=True, **settings)
    assert again.state.best_model_checkpoint == str(best)
    assert_same_weights(whole, again)
    for name, counts in whole.neuron_table().counts.items():
        assert torch.equal(counts, again.neuron_table().counts[name])
