"""On the built-in task of facts, which only neurons limit, methods do what they are for. Slow: about a minute.

`pytest tests/trainer/test_facts_tell_methods_apart.py -s` prints the losses.
"""

import pytest
import torch
from support.tiny_runs import arguments  # noqa: F401
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM, default_data_collator, set_seed

from hf_recycle import RecyclingTrainer, find_feed_forwards
from hf_recycle.data.facts import Facts

pytestmark = pytest.mark.slow

KEYS, VALUES, D_MODEL, D_FF, BATCH, STEPS = 48, 64, 64, 48, 384, 600
CLEARLY = 0.05
"""Nats. The differences seen are 0.12 to 0.32."""

EVERY = STEPS // 10
DEAD = {"recycle_steps": EVERY, "recycle_fraction": 0.2}
ARMS = {
    "none": {},
    "random": {"recycle_steps": EVERY, "recycle_fraction": 0.1, "recycle_selection": "random"},
    "dormant": DEAD | {"recycle_selection": "dormant", "recycle_threshold": 0.025, "recycle_reinit": "zero_out"},
}


def facts() -> Facts:
    return Facts(KEYS, VALUES, KEYS**2, epochs=STEPS * BATCH // KEYS**2)


def final_loss(args, half_dead: bool) -> float:
    """The loss on all facts after training a pre-LN BERT of one layer, with half of its neurons dead at the start."""
    set_seed(args.seed)
    config = RobertaPreLayerNormConfig(
        vocab_size=5 + KEYS + VALUES,
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=D_FF,
        hidden_act="relu",
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        max_position_embeddings=6,
        type_vocab_size=1,
        pad_token_id=0,
        initializer_range=0.05,
    )
    model, data = RobertaPreLayerNormForMaskedLM(config), facts()
    if half_dead:
        with torch.no_grad():
            find_feed_forwards(model)[0]["in.bias"].parameter[: D_FF // 2] = -10
    trainer = RecyclingTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data.last_task(),
        data_collator=default_data_collator,
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


@pytest.fixture
def settings(arguments):  # noqa: F811
    return lambda seed, **more: arguments(
        seed=seed,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=KEYS**2,
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        warmup_steps=STEPS // 8,
        adam_beta2=0.98,
        logging_steps=STEPS,
        # Nothing here is drawn at random but the first weights; this spares a third of the time.
        deterministic_masking=False,
        remove_unused_columns=False,
        **more,
    )


@pytest.mark.parametrize("seed", range(2))
def test_dead_neurons_that_are_found_and_reborn_lower_the_loss(settings, seed):
    losses = {name: final_loss(settings(seed, **arm), half_dead=True) for name, arm in ARMS.items()}
    print(f"\nseed {seed}, half dead at the start: {losses}")
    assert losses["dormant"] < losses["none"] - CLEARLY
    assert losses["dormant"] < losses["random"] - CLEARLY


def test_the_surgeon_with_a_fold_prunes_half_at_less_loss_than_low_magnitude(settings):
    at_once = {"prune_fraction": 0.5, "prune_start": STEPS, "prune_end": STEPS}
    low, surgeon = (
        final_loss(settings(0, **at_once, **how), half_dead=False)
        for how in ({}, {"prune_selection": "obs", "prune_fold": "least_squares"})
    )
    print(f"\nseed 0, half pruned: low_magnitude {low}, obs with least_squares {surgeon}")
    assert surgeon < low - 2 * CLEARLY
