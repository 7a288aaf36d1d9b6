"""What the trainer refuses, logs and does with models of other kinds."""

import math
from pathlib import Path

import datasets
import pytest
import torch
from support.tiny_runs import assert_same_weights, losses, masked_sentences, sentences, tiny_bert
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_recycle import (
    RecyclingArguments,
    RecyclingCallback,
    RecyclingHistory,
    RecyclingTrainer,
)
from hf_recycle.methods.midpoint import Midpoint
from hf_recycle.runs.summary import summary_text

PLAIN = {"recycle_steps": 3, "recycle_fraction": 0.1}


# ---- Bad input ----


def test_stock_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="RecyclingTrainer needs RecyclingArguments, not TrainingArguments"):
        RecyclingTrainer(model=tiny_bert(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_data_parallel_is_refused_with_the_launch_command(arguments, monkeypatch):
    monkeypatch.setattr(RecyclingArguments, "n_gpu", property(lambda self: 3))
    with pytest.raises(ValueError, match=r"accelerate launch --num_processes 3"):
        RecyclingTrainer(model=tiny_bert(), args=arguments())


def test_a_model_without_feed_forward_is_refused_before_training(arguments):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 8)
            self.out = nn.Linear(8, 64)

        def forward(self, input_ids, labels=None):
            logits = self.out(self.embedding(input_ids))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    with pytest.raises(ValueError, match="No feed-forward block was found in Flat"):
        RecyclingTrainer(model=Flat(), args=arguments(**PLAIN), train_dataset=masked_sentences())
    # Without a method there is nothing to refuse.
    trainer = RecyclingTrainer(
        model=Flat(), args=arguments(save_strategy="steps", save_steps=6), train_dataset=masked_sentences()
    )
    trainer.train()
    assert trainer.state.global_step == 12


def test_masked_head_without_labels(arguments):
    trainer = RecyclingTrainer(model=tiny_bert(), args=arguments(), train_dataset=sentences())
    with pytest.raises(ValueError, match=r"masked_head=True needs labels.*masking collator.*masked_head=False"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_unknown_optimizer_is_refused_before_the_first_step(arguments):
    model = tiny_bert()
    trainer = RecyclingTrainer(
        model=model,
        args=arguments(**PLAIN),
        train_dataset=masked_sentences(),
        optimizers=(torch.optim.Rprop(model.parameters()), None),
    )
    with pytest.raises(ValueError, match=r"recycle_optimizer_state=.*Rprop.*'keep'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_one_method_asked_for_twice_is_refused(arguments):
    with pytest.raises(ValueError, match="RecyclingCallback is passed in callbacks and recycle_"):
        RecyclingTrainer(model=tiny_bert(), args=arguments(**PLAIN), callbacks=[RecyclingCallback(steps=3)])


def test_start_after_end_is_seen_after_resolving_fractions(arguments):
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(recycle_steps=2, recycle_start=0.9, recycle_end=5),
        train_dataset=masked_sentences(),
    )
    with pytest.raises(ValueError, match="recycle_start=11 is after recycle_end=5"):
        trainer.train()


def test_too_much_immunity_warns_at_start_and_is_recorded_at_the_phase(arguments, said):
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(recycle_steps=2, recycle_fraction=0.5, recycle_immunity=3),
        train_dataset=masked_sentences(),
    )
    trainer.train()
    assert any("recycle_immunity=3 with recycle_fraction=0.5 leaves fewer eligible" in text for text in said())
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    short = [row for row in rows if row["step"] == 6]
    assert [row["eligible"] for row in short] == [0, 0]
    assert all(row["recycled"] == [] and row["requested"] == 16 and "too few eligible" in row["note"] for row in short)


def test_smooth_steps_longer_than_the_gap_are_allowed_and_said(arguments, said):
    trainer = RecyclingTrainer(
        model=tiny_bert(), args=arguments(recycle_smooth_steps=5, **PLAIN), train_dataset=masked_sentences()
    )
    trainer.train()
    assert any("recycle_smooth_steps=5 is longer than the 3 steps between phases" in text for text in said())


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_in_any_micro_batch_skips_the_phase(arguments, broken, value):
    class Broken(RecyclingTrainer):
        batches = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.batches += 1
            # With gradients that leave the weights finite.
            return loss + (value if self.batches == 2 * 2 + broken + 1 else 0.0)

    args = arguments(gradient_accumulation_steps=2, per_device_train_batch_size=2, **PLAIN)
    trainer = Broken(model=tiny_bert(), args=args, train_dataset=masked_sentences())
    trainer.train()
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    skipped = [row for row in rows if row["step"] == 3]
    assert [row["recycled"] for row in skipped] == [[], []]
    assert all(row["note"] == "skipped: the loss is not finite" for row in skipped)
    assert all(row["recycled"] for row in rows if row["step"] == 6)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("broken", [{2}, *(pytest.param(at, marks=pytest.mark.slow) for at in ({2, 5}, {2, 5, 8}))])
def test_skipped_phases_are_saved_and_resumed_like_others(arguments, broken):
    """One, several one after the other, and all."""

    class Broken(RecyclingTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + (math.inf if self.state.global_step in broken else 0.0)

    def run(**settings):
        args = arguments(max_steps=10, save_strategy="steps", save_steps=7, **PLAIN)
        trainer = Broken(model=tiny_bert(0.0), args=args, train_dataset=masked_sentences())
        trainer.train(**settings)
        return trainer

    whole = run()
    folder = Path(whole.args.output_dir, "checkpoint-10")
    history = RecyclingHistory.from_pretrained(folder)
    assert history.stats["phases"] == whole.neuron_table().phases == 3 - len(broken)
    assert history.events["step"].tolist() == [3, 3, 6, 6, 9, 9]
    assert [bool(note) for note in history.events["note"]] == [step - 1 in broken for step in history.events["step"]]
    expected = f"{3 - len(broken)} selection phases" if len(broken) < 3 else "none recycled"
    assert expected in summary_text(history)
    resumed = run(resume_from_checkpoint=str(folder.with_name("checkpoint-7")))
    assert_same_weights(whole, resumed)
    again = RecyclingHistory.from_pretrained(folder)
    assert again.events.astype(str).equals(history.events.astype(str))


def test_weights_that_are_not_finite_get_no_nan_neurons(arguments):
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 5] = math.nan
    trainer = RecyclingTrainer(
        model=model, args=arguments(recycle_reinit="matched_normal", **PLAIN), train_dataset=masked_sentences()
    )
    trainer.train()
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    assert rows
    assert all(row["recycled"] == [] and "not finite" in row["note"] for row in rows)


# ---- Logging ----


def test_scalars_reach_the_log_history_and_the_trackers(arguments, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(
            recycle_smooth_steps=2,
            recycle_immunity=1,
            midpoint_weight=0.1,
            report_to="tensorboard",
            **PLAIN,
        ),
        train_dataset=masked_sentences(),
    )
    trainer.train()
    row = next(row for row in trainer.state.log_history if row["step"] == 7 and "loss" in row)
    # Two phases by step 7, at 3 and 6: ⌊3.2⌋ + (⌊6.4⌋ − ⌊3.2⌋) neurons of each of two blocks.
    assert row["recycling/neurons_recycled"] == 12
    assert row["recycling/neurons_ever_recycled_share"] == 12 / 64
    assert row["recycling/neurons_immune"] == 6
    assert row["recycling/neurons_fading_in"] == 6
    assert row["recycling/magnitude_p10"] <= row["recycling/magnitude_p50"] <= row["recycling/magnitude_p90"]
    assert row["recycling/midpoint_loss"] > 0
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/recycling/neurons_recycled")][:7] == [0, 0, 6, 6, 6, 12, 12]


def test_everything_off_logs_nothing_more(arguments):
    trainer = RecyclingTrainer(model=tiny_bert(), args=arguments(), train_dataset=masked_sentences())
    trainer.train()
    assert set(trainer.state.log_history[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}


# ---- The course of training ----


def test_recycling_leaves_data_and_dropout_of_the_baseline_alone(train):
    """Up to the first phase, and with a phase that changes nothing that matters, losses are those of the baseline."""
    baseline = train("baseline")
    recycled = train("recycled", recycle_steps=6, recycle_fraction=0.1, recycle_selection="random")
    assert losses(baseline)[:6] == losses(recycled)[:6]
    nothing = train("nothing", recycle_steps=1, recycle_fraction=0.001, recycle_reinit="copy_noise")
    assert losses(baseline) == losses(nothing)


def test_gradients_are_scaled_before_they_are_clipped(arguments):
    """The clipping norm of a step counts the gradient of a neuron fading in times α: at α = 0, not at all."""
    norms = {}
    for name, smooth in (("whole", 0), ("fading in", 100)):
        trainer = RecyclingTrainer(
            model=tiny_bert(dropout=0.0),
            args=arguments(
                max_steps=4,
                recycle_steps=1,
                recycle_end=1,
                recycle_fraction=1.0,
                recycle_smooth_steps=smooth,
                recycle_optimizer_state="keep",
            ),
            train_dataset=masked_sentences(),
        )
        seen = []
        original = trainer._clip_grad_norm

        def spy(model, trainer=trainer, original=original, seen=seen):
            norm = original(model)
            block = trainer.neuron_table().blocks[0]
            seen.append((float(norm), [float(piece.parameter.grad.norm()) for piece in block.slices]))
            return norm

        trainer._clip_grad_norm = spy
        trainer.train()
        norms[name] = seen
    # Step 2 is the first after the phase: α = 0, so no gradient is left in the FF weights; step 3 has α = 0.01.
    assert norms["fading in"][1][1] == [0.0, 0.0, 0.0]
    assert all(norm > 0 for norm in norms["fading in"][2][1])
    assert all(norm > 0 for norm in norms["whole"][1][1])


def test_scheduled_learning_rate_of_the_midpoint_step(arguments, monkeypatch):
    """The step just taken has the learning rate before the scheduler moves on: with SGD at lr 0 the only change of the
    FF weights is the midpoint's, and the last of the linear schedule's steps tells its lr."""
    seen = []
    original = Midpoint.after_step

    def after_step(self, info):
        block = self.table.blocks[0]
        in_norm, out_norm = (norm.clone() for norm in block.norms())
        derivative = 2 * (in_norm * out_norm - (in_norm * out_norm).mean())  # of the squared distance from the mean
        original(self, info)
        change = 1 - block.norms()[0] / in_norm
        seen.append(float((change / (derivative * out_norm / in_norm * self.settings.weight)).median()))

    monkeypatch.setattr(Midpoint, "after_step", after_step)
    RecyclingTrainer(
        model=tiny_bert(dropout=0.0),
        args=arguments(max_steps=4, learning_rate=0.08, optim="sgd", midpoint_weight=5.0, midpoint_distance="l2"),
        train_dataset=masked_sentences(),
    ).train()
    assert seen == pytest.approx([0.08, 0.06, 0.04, 0.02], rel=2e-2)


# ---- Models of other kinds ----


def test_causal_model(arguments, tokenizer):
    set_seed(3)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=2, eos_token_id=3)
    set_seed(3)
    runs = []
    for cls, extra in ((Trainer, {}), (RecyclingTrainer, {"masked_head": False}), (RecyclingTrainer, PLAIN)):
        set_seed(3)
        trainer = cls(
            model=GPT2LMHeadModel(config),
            args=arguments(gradient_accumulation_steps=2, **extra),
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        runs.append(trainer)
    stock, off, recycled = runs
    assert losses(stock) == losses(off)
    assert_same_weights(stock, off)
    assert sum(int(counts.sum()) for counts in recycled.neuron_table().counts.values()) == 2 * math.floor(0.1 * 64 * 3)


def test_encoder_decoder_model(arguments):
    config = T5Config(
        vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0, pad_token_id=0
    )
    set_seed(3)
    trainer = RecyclingTrainer(
        model=T5ForConditionalGeneration(config),
        args=arguments(recycle_smooth_steps=2, midpoint_weight=0.01, **PLAIN),
        train_dataset=masked_sentences(),
        eval_dataset=masked_sentences(8),
    )
    trainer.train()
    assert len(trainer.neuron_table().counts) == 4
    assert "eval_perplexity" not in trainer.evaluate()


def test_every_public_name_can_be_imported():
    import hf_recycle

    for name in hf_recycle.__all__:
        assert getattr(hf_recycle, name) is not None


@pytest.mark.parametrize("streaming", [False, True])
def test_every_pass_over_the_data_has_its_own_masks(streaming, arguments, tokenizer):
    """Two passes over the same eight samples in the same order: the same tokens, other masks."""
    seen = []

    class Spy(RecyclingTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"]))
            seen.append(inputs["labels"] != -100)
            return super().training_step(model, inputs, *args, **kwargs)

    data = datasets.Dataset.from_list(sentences(8))
    Spy(
        model=tiny_bert(),
        args=arguments(max_steps=4, train_sampling_strategy="sequential"),
        train_dataset=data.to_iterable_dataset() if streaming else data,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    ).train()
    tokens, masks = seen[::2], seen[1::2]
    for first, second in ((0, 2), (1, 3)):
        assert torch.equal(tokens[first], tokens[second])
        assert not torch.equal(masks[first], masks[second])
