"""The share of masked tokens as a schedule: a pure function of the optimizer step, in every loader."""

import datasets
import numpy as np
import pytest
import torch
from support.tiny_runs import end_workers
from transformers import BertConfig, BertForMaskedLM, set_seed

from hf_recycle import RecyclingArguments, RecyclingTrainer
from hf_recycle.batches.clock import TrainingClock, moments_of_batch
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.errors import UserError
from hf_recycle.mlm.mask_rates import MaskRates
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.runs.run import prepare_data


def test_in_steps_a_share_holds_until_the_next():
    rates = MaskRates({"0": 0.3, "0.5": 0.15, "8": 0.05})
    assert rates.at(np.arange(10), 10).tolist() == [0.3] * 5 + [0.15] * 3 + [0.05] * 2
    assert MaskRates({"4": 0.3, 6: 0.1}).at(np.array([0, 5, 6, 99]), 10).tolist() == [0.3, 0.3, 0.1, 0.1]


def test_linearly_it_changes_evenly():
    rates = MaskRates({0: 0.3, 1.0: 0.1}, "linear").at(np.array([0, 5, 10, 20]), 20)
    assert rates == pytest.approx([0.3, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ("points", "shape", "message"),
    [
        ({}, "steps", "must be a mapping"),
        ([0.3], "steps", "must be a mapping"),
        ({"x": 0.3}, "steps", "'x' must be a step"),
        ({"-1": 0.3}, "steps", "'-1' must be a step"),
        ({"1.5": 0.3}, "steps", "'1.5' must be a step"),
        ({"nan": 0.3}, "steps", "'nan' must be a step"),
        ({0: 0}, "steps", "the share 0 at 0 must lie between 0 and 1"),
        ({0: "0.3"}, "steps", "the share '0.3' at 0 must lie"),
        ({0: 0.3}, "cosine", "mlm_probability_shape='cosine' is unknown; use steps or linear"),
    ],
)
def test_what_is_no_schedule(points, shape, message):
    with pytest.raises(UserError, match=message) as caught:
        DataArguments(mlm_probability_schedule=points, mlm_probability_shape=shape)
    assert "\n" not in str(caught.value)


def test_points_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"fall on steps \[50, 8\] of 100: order them"):
        MaskRates({"0.5": 0.3, "8": 0.1}).at(np.arange(3), 100)


def test_a_task_without_masks_is_refused():
    with pytest.raises(UserError, match=r"mlm_probability_schedule=.* and task='clm' masks nothing"):
        prepare_data(ModelArguments(task="clm"), DataArguments(mlm_probability_schedule={0: 0.3}))


def test_the_moment_of_a_place():
    clock = TrainingClock()
    assert clock.moments([3]) == [None]  # an evaluation's
    clock.set_training(20, examples_per_step=4)
    clock.set_epoch(1, first_step=10)
    assert clock.moments([0, 3, 4, 39, None]) == [(10, 20), (10, 20), (11, 20), (19, 20), None]
    assert moments_of_batch() is None


class Noting(RecyclingTrainer):
    """Keeps the labels of every micro-batch, as lists."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        vars(self).setdefault("seen", []).append(inputs["labels"].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


RATES = {"0": 0.6, "5": 0.1, "0.75": 0.4}
SHARES = [0.6] * 5 + [0.1] * 4 + [0.4] * 3


@pytest.fixture
def run(tokenizer, tmp_path):
    """`run(**settings)`: a trainer after 12 steps of 2 micro-batches of 8, over 80 sequences: an epoch has 5 steps."""
    rows = np.random.default_rng(0).integers(5, 200, (80, 40)).tolist()

    def train(stream=False, resume=None, **settings):
        set_seed(1)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        data = datasets.Dataset.from_dict({"input_ids": rows})
        trainer = Noting(
            model=BertForMaskedLM(BertConfig(vocab_size=200, max_position_embeddings=40, **sizes)),
            args=RecyclingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=12,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                save_steps=7,
                use_cpu=True,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=data.to_iterable_dataset() if stream else data,
            eval_dataset=data.select(range(32)),
            data_collator=MaskedLanguageModelingCollator(tokenizer, mask_rates=MaskRates(RATES)),
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / "run" / "checkpoint-7"))
        return trainer

    return train


def share(labels) -> float:
    return (torch.tensor(labels) != -100).double().mean().item()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_step_masks_its_share_and_a_resumed_run_the_same_tokens(run, stream, workers):
    """Steps 5 and 9 lie within and between epochs, and workers read ahead of them."""
    loading = {"dataloader_num_workers": workers} | ({"dataloader_persistent_workers": True} if workers else {})
    if stream and workers:
        loading = {"dataloader_num_workers": 1}  # more read shards, of which there is one
    whole = run(stream=stream, **loading)
    found = [share(whole.seen[2 * step] + whole.seen[2 * step + 1]) for step in range(12)]
    assert found == pytest.approx(SHARES, abs=0.06)
    resumed = run(stream=stream, resume=True, **loading)
    assert resumed.seen == whole.seen[14:]
    for trainer in (whole, resumed):
        end_workers(trainer)


def test_an_evaluation_masks_the_share_of_every_other_run(run):
    trainer = run()
    labels = [batch["labels"].tolist() for batch in trainer.get_eval_dataloader()]
    assert share([row for rows in labels for row in rows]) == pytest.approx(0.15, abs=0.03)
