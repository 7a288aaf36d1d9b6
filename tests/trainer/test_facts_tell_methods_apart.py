"""On the built-in task of facts methods do what they are for; what they are worth, the study `revive` measures.

`pytest tests/trainer/test_facts_tell_methods_apart.py -s` prints the losses.
"""

import pytest
import torch
from support.tiny_runs import arguments  # noqa: F401
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM, default_data_collator, set_seed

from hf_recycle import RecyclingTrainer, find_feed_forwards
from hf_recycle.data.facts import Facts

pytestmark = pytest.mark.long

D_MODEL = 32
CLEARLY = 0.05
"""Nats; what is seen is more."""

STEPS = 400
FACTS = Facts(keys=32, values=32, number=32**2, epochs=STEPS // 2)
HALF_AN_EPOCH, ONE_EPOCH = 512, 256  # facts of a step, see FACTS and TASKS
TASKS = Facts(keys=16, values=32, number=16**2, tasks=12, epochs=50)

DEAD = {"recycle_steps": STEPS // 10, "recycle_fraction": 0.2, "recycle_probe_batches": 4}
ARMS = {
    "none": {},
    "random": {"recycle_steps": STEPS // 10, "recycle_fraction": 0.1, "recycle_selection": "random"},
    "dormant": DEAD | {"recycle_selection": "dormant", "recycle_threshold": 0.025, "recycle_reinit": "zero_out"},
}


@pytest.fixture
def final_loss(arguments):  # noqa: F811
    """`final_loss(data, neurons, batch, seed, dead, **arguments)`: the loss on all facts of the last task after a
    pre-LN BERT of one layer was trained on `data`, its first `dead` neurons dead at the start."""

    def train(data: Facts, neurons: int, batch: int, seed: int, dead: int = 0, **settings) -> float:
        set_seed(seed)
        config = RobertaPreLayerNormConfig(
            vocab_size=5 + 2 * data.keys + data.values,
            hidden_size=D_MODEL,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=neurons,
            hidden_act="relu",
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            max_position_embeddings=6,
            type_vocab_size=1,
            pad_token_id=0,
            initializer_range=0.1,
        )
        model = RobertaPreLayerNormForMaskedLM(config)
        with torch.no_grad():
            find_feed_forwards(model)[0]["in.bias"].parameter[:dead] = -10
        steps = len(data) // batch
        args = arguments(
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=data.number,
            train_sampling_strategy="sequential",
            adam_beta2=0.98,
            logging_steps=steps,
            # Nothing here is drawn at random but the first weights; this spares a third of the time.
            deterministic_masking=False,
            remove_unused_columns=False,
            **settings,
        )
        trainer = RecyclingTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=data.last_task(),
            data_collator=default_data_collator,
        )
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    return train


WARM_UP = {"learning_rate": 5e-3, "warmup_steps": STEPS // 8}


def test_dead_neurons_that_are_found_and_reborn_lower_the_loss(final_loss):
    losses = {name: final_loss(FACTS, 24, HALF_AN_EPOCH, 0, dead=12, **WARM_UP, **arm) for name, arm in ARMS.items()}
    print(f"\nseed 0, half dead at the start: {losses}")
    assert losses["dormant"] < losses["none"] - CLEARLY
    assert losses["dormant"] < losses["random"] - CLEARLY


def test_the_surgeon_with_a_fold_prunes_half_at_less_loss_than_low_magnitude(final_loss):
    at_once = WARM_UP | {"prune_fraction": 0.5, "prune_start": STEPS, "prune_end": STEPS}
    low, surgeon = (
        final_loss(FACTS, 24, HALF_AN_EPOCH, 0, **at_once, **how)
        for how in ({}, {"prune_selection": "obs", "prune_fold": "least_squares"})
    )
    print(f"\nseed 0, half pruned: low_magnitude {low}, obs with least_squares {surgeon}")
    assert surgeon < low - 2 * CLEARLY


def test_weights_that_are_pulled_to_where_they_began_learn_the_last_of_twelve_tasks(final_loss):
    """The same keys get other values in each task; a model that knew nothing would have a loss of 3.47."""
    constant = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    plain, pulled = (final_loss(TASKS, 32, ONE_EPOCH, 0, **constant, l2_init_weight=weight) for weight in (0.0, 1.0))
    print(f"\nseed 0, last of 12 tasks: plain {plain}, l2_init {pulled}")
    assert pulled < 1.5 < 2 < plain
