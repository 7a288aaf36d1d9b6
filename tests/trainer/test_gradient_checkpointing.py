"""Gradient checkpointing changes the memory a run takes and nothing else. With dropout, so that what is computed twice
must draw the same twice."""

import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, sentences, tiny_bert, tiny_modernbert
from transformers import DataCollatorForLanguageModeling

from hf_recycle import RecyclingTrainer

METHODS = {
    "plain": {"recycle_steps": 3, "recycle_fraction": 0.1},
    "immunity_matched": {
        "recycle_steps": 2,
        "recycle_fraction": 0.2,
        "recycle_immunity": 2,
        "recycle_reinit": "matched_normal",
    },
    "smooth": {"recycle_steps": 3, "recycle_fraction": 0.1, "recycle_smooth_steps": 4},
    "midpoint": {"midpoint_weight": 5.0, "midpoint_distance": "l2"},
}


@pytest.fixture
def run(arguments, tokenizer):
    def train(build, **settings):
        trainer = RecyclingTrainer(
            model=build(),
            args=arguments(max_steps=8, **settings),
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )
        recomputed = []
        layer = trainer.neuron_table().blocks[0].in_slices[0].module
        layer.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
        trainer.train()
        return trainer, len(recomputed)

    return train


@pytest.mark.parametrize(
    "method", [name if name == "smooth" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_same_as_without(method, run):
    without, forwards = run(tiny_bert, **METHODS[method])
    for reentrant in (False, True):
        checkpointed, again = run(
            tiny_bert,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
            **METHODS[method],
        )
        assert (forwards, again) == (8, 16)
        assert checkpointed.args.masked_head
        assert losses(without) == losses(checkpointed)
        assert_same_weights(without, checkpointed)
        first, second = (trainer.neuron_table().state_dict() for trainer in (without, checkpointed))
        assert all(torch.equal(values, second[key]) for key, values in first.items())


def test_accumulation_and_another_family(run):
    settings = METHODS["smooth"] | {"gradient_accumulation_steps": 2}
    without, _ = run(tiny_modernbert, **settings)
    checkpointed, _ = run(tiny_modernbert, activation_checkpointing=True, **settings)
    assert losses(without) == losses(checkpointed)
    assert_same_weights(without, checkpointed)


@pytest.mark.filterwarnings("default:`gradient_checkpointing`:FutureWarning")
def test_under_its_old_name(run):
    without, _ = run(tiny_bert, **METHODS["smooth"])
    checkpointed, forwards = run(tiny_bert, gradient_checkpointing=True, **METHODS["smooth"])
    assert forwards == 16
    assert_same_weights(without, checkpointed)
