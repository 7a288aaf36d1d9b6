"""Overtraining in whole training runs, against a naive loop in plain torch."""

import copy
import random

import numpy as np
import pytest
import torch
from support.tiny_runs import VOCABULARY, assert_same_weights, losses, masked_sentences, sentences, tiny_bert
from test_resume import interrupt_and_compare
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_recycle import OvertrainingCallback, RecyclingHistory, RecyclingTrainer
from hf_recycle.methods.overtraining.callback import Overtraining
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.runs.summary import summary_text

OVERTRAINING = {"overtrain_steps": 4, "overtrain_batches": 3}
FEED_FORWARD = ("intermediate.dense.weight", "intermediate.dense.bias", "layer.{}.output.dense.weight")


class Before(TrainerCallback):
    """Copies the model as it is right before overtraining (callbacks of the user come first)."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.at:
            self.model = copy.deepcopy(model)
            self.rate = optimizer.param_groups[0]["lr"]
            self.magnitudes = NeuronTable.of(model).magnitudes()


@pytest.fixture
def overtrained(arguments, monkeypatch):
    """`overtrained(**settings)`: a run whose last step is followed by overtraining, the model before it, and the
    extra batches."""

    def run(**overrides):
        before, batches = Before(at=4), []
        original = RecyclingTrainer.loss_of

        def loss_of(self, model, batch):
            batches.append({name: value for name, value in batch.items() if name in ("input_ids", "labels")})
            return original(self, model, batch)

        monkeypatch.setattr(RecyclingTrainer, "loss_of", loss_of)
        trainer = RecyclingTrainer(
            model=tiny_bert(0.0),
            args=arguments(max_steps=4, lr_scheduler_type="constant", **OVERTRAINING | overrides),
            train_dataset=masked_sentences(),
            data_collator=default_data_collator,
            callbacks=[before],
        )
        trainer.train()
        return trainer, before, batches

    return run


def masks_of(model, chosen) -> dict[str, torch.Tensor]:
    """Which entries of which parameters may change, {name: bool}, spelled out for BERT."""
    masks = {}
    for layer, rows in enumerate(chosen):
        prefix = f"bert.encoder.layer.{layer}"
        neurons = torch.zeros(32, dtype=torch.bool)
        neurons[rows] = True
        masks[f"{prefix}.intermediate.dense.weight"] = neurons[:, None].expand(32, 16)
        masks[f"{prefix}.intermediate.dense.bias"] = neurons
        masks[f"{prefix}.output.dense.weight"] = neurons[None].expand(16, 32)
    return masks


def naive_overtraining(model, masks, batches, optimizer_class, options, rate, clip, half=False):
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in masks}
    no_decay = {"weight_decay": 0.0}  # the Trainer decays no biases
    groups = [{"params": [p], **(no_decay if p.dim() == 1 else {})} for p in parameters.values()]
    optimizer = optimizer_class(groups, lr=rate, **options)
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(input_ids=batch["input_ids"]).logits.float()
        F.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1)).backward()
        for name, parameter in parameters.items():
            parameter.grad[~masks[name]] = 0
        norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad *= min(1, clip / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate / 2 if number == 0 else rate  # a tenth of 3 batches: one
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.where(masks[name], parameter, before[name]))
        model.zero_grad()
    return model


@pytest.mark.parametrize("masked_head", [True, False])
@pytest.mark.parametrize(
    ("arguments_", "optimizer_class", "options"),
    [
        ({"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        ({"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1.0}, torch.optim.SGD, {"momentum": 0.9}),
        ({"bf16": True, "adam_beta2": 0.9}, torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.9, 0.9)}),
    ],
    ids=["adamw", "sgd", "bf16"],
)
@pytest.mark.parametrize("subset", ["all", "smallest", "largest"])
def test_equals_a_naive_loop(subset, arguments_, optimizer_class, options, masked_head, overtrained):
    share = {} if subset == "all" else {"overtrain_fraction": 0.3}
    trainer, before, batches = overtrained(
        overtrain_subset=subset, max_grad_norm=1e-3, masked_head=masked_head, **share, **arguments_
    )
    assert len(batches) == 3
    order = [magnitudes.argsort() for magnitudes in before.magnitudes.values()]
    # 0.3 of 32 neurons is 9.6.
    chosen = [{"all": rows, "smallest": rows[:9], "largest": rows[-9:]}[subset] for rows in order]
    masks = masks_of(before.model, chosen)
    start = {name: value.clone() for name, value in before.model.state_dict().items()}
    half = "bf16" in arguments_
    expected = naive_overtraining(
        before.model, masks, batches, optimizer_class, options, before.rate, clip=1e-3, half=half
    ).state_dict()
    moved = 0
    for name, value in trainer.model.state_dict().items():
        mask = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~mask], start[name][~mask]), name
        moved += int((value[mask] != start[name][mask]).sum())
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=5e-4 if half else 2e-6, msg=name)
    assert moved > 0.9 * sum(int(mask.sum()) for mask in masks.values())


class Restore(TrainerCallback):
    """Takes overtraining back: added after its callback, so it acts after it. Also notes what it left behind."""

    def __init__(self, before):
        self.before, self.changed, self.left = before, 0, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.left.append(
            (
                [p.requires_grad for p in model.parameters()],
                [m.training for m in model.modules()],
                [p.grad is None for p in model.parameters()],
                random.getstate(),
                np.random.get_state()[1].tolist(),  # noqa: NPY002
                torch.get_rng_state().tolist(),
            )
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self.changed += int(not torch.equal(parameter, self.before.weights[name]))
                parameter.copy_(self.before.weights[name])


class Weights(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        # Something for overtraining to put back: a frozen parameter and a module in evaluation mode.
        model.bert.embeddings.word_embeddings.weight.requires_grad_(state.global_step % 2 == 0)
        model.bert.encoder.layer[0].eval()
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor"])
def test_the_main_run_goes_on_exactly_where_it_was(optimizer, arguments, train):
    """With dropout, dynamic masks, accumulation and a learning rate schedule."""
    from support.words import word_tokenizer
    from transformers import DataCollatorForLanguageModeling

    runs, seen = [], []
    for settings in ({}, {"overtrain_steps": 2, "overtrain_batches": 2}):
        trainer = RecyclingTrainer(
            model=tiny_bert(),
            args=arguments(
                optim=optimizer,
                gradient_accumulation_steps=2,
                weight_decay=0.1,
                warmup_steps=3,
                deterministic_masking=True,
                **settings,
            ),
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(word_tokenizer()),
            callbacks=[before := Weights()],
        )
        trainer.add_callback(restore := Restore(before))
        trainer.train()
        runs.append(trainer)
        seen.append(restore)
    assert losses(runs[0]) == losses(runs[1])
    assert_same_weights(*runs)
    assert (seen[0].changed, seen[1].changed) == (0, 5 * 2 * 3)  # the rate is 0 at the end, so 5 times 2 blocks
    assert seen[0].left == seen[1].left
    first, second = (run.optimizer.state_dict()["state"] for run in runs)
    for number, entries in first.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[number][key])), key


EVERYTHING = {
    "overtrain_steps": 2,
    "overtrain_batches": 3,
    "overtrain_subset": "random",
    "overtrain_fraction": 0.4,
    "recycle_steps": 3,
    "recycle_fraction": 0.1,
    "recycle_smooth_steps": 4,
    "prune_fraction": 0.3,
    "prune_steps": 2,
    "midpoint_weight": 0.05,
}


@pytest.mark.parametrize("at", [1, 6, 9])
def test_resume_is_exact(at, train):
    """12 samples at a time out of 48: the second pass ends and begins again."""
    whole, resumed = interrupt_and_compare(train, at, lr_scheduler_type="constant", **EVERYTHING)
    assert whole.neuron_table().overtrain_samples == resumed.neuron_table().overtrain_samples == 6 * 3 * 4
    for name in ("recycling/overtrain_tokens", "recycling/overtrain_loss"):
        logged = [[row.get(name) for row in run.state.log_history if "loss" in row] for run in (whole, resumed)]
        assert logged[0][-1] == logged[1][-1] is not None


class Untouched:
    """Compares neurons that are pruned or fading in before and after overtraining."""

    def __init__(self):
        self.rows, self.free_rows = [], 0

    def look(self, table):
        self.table = table
        self.weights = [block.read(torch.arange(block.num_neurons)) for block in self.table.blocks]

    def compare(self):
        for block, state, before in zip(self.table.blocks, self.table.states, self.weights, strict=True):
            off = state.pruned | state.fading_in()
            now = block.read(torch.arange(block.num_neurons))
            same = torch.stack([(now[r] == before[r]).reshape(len(off), -1).all(1) for r in now]).all(0)
            self.rows.append((int(off.sum()), bool(same[off].all())))
            self.free_rows += int((~same).sum())


@pytest.mark.parametrize("subset", ["all", "largest"])
def test_pruned_neurons_and_those_in_transition_are_left_out(subset, train, monkeypatch):
    spy = Untouched()
    original = Overtraining.after_step

    def after_step(self, info):
        spy.look(self.table)  # after pruning and recycling, right before overtraining
        original(self, info)
        spy.compare()

    monkeypatch.setattr(Overtraining, "after_step", after_step)
    settings = EVERYTHING | {"overtrain_subset": subset, "overtrain_fraction": 1.0, "weight_decay": 0.1}
    train(lr_scheduler_type="constant", **settings)
    assert all(same for _, same in spy.rows)
    assert max(number for number, _ in spy.rows) >= 10
    assert spy.free_rows > 100


def test_random_subsets_have_the_exact_size_and_change(train, tmp_path):
    moved = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.before = NeuronTable.of(model).blocks[0].read(torch.arange(32))["in"]

    class Then(TrainerCallback):
        def on_log(self, args, state, control, model=None, **kwargs):
            after = NeuronTable.of(model).blocks[0].read(torch.arange(32))["in"]
            if state.global_step % 3 == 0 and state.global_step < 12:
                moved.append(frozenset((after != spy.before).any(1).nonzero().flatten().tolist()))

    spy = Spy()
    settings = {"overtrain_steps": 3, "overtrain_batches": 1, "overtrain_subset": "random", "overtrain_fraction": 0.3}
    trainer = train(callbacks=[spy, Then()], save_strategy="steps", save_steps=12, **settings)
    assert [len(rows) for rows in moved] == [9, 9, 9]
    assert len(set(moved)) == 3
    # Not at step 12, where the learning rate is 0.
    assert RecyclingHistory.from_pretrained(tmp_path / "run").overtrainings["neurons"].tolist() == [18, 18, 18]
    assert trainer.state.log_history[1]["recycling/overtrain_tokens"] == 0


def test_what_it_cost_is_told(train, tmp_path):
    settings = {"lr_scheduler_type": "constant", "magnitude_steps": 4, "save_strategy": "steps", "save_steps": 6}
    trainer = train(**OVERTRAINING, **settings)
    history = RecyclingHistory.from_pretrained(tmp_path / "run")
    # 3 times 3 batches of 4 sequences of 12 tokens.
    assert history.stats["overtraining"] == {"times": 3, "batches": 9, "samples": 36, "tokens": 432}
    told = history.overtrainings
    assert told["step"].tolist() == [4, 8, 12]
    assert told["tokens"].tolist() == [144] * 3
    assert told["neurons"].tolist() == [64] * 3
    assert told["learning_rate"].tolist() == pytest.approx([1e-2] * 3)
    assert trainer.neuron_table().overtrain_tokens == 432
    name = "recycling/overtrain_tokens"
    logged = [row[name] for row in trainer.state.log_history if name in row]
    assert logged == [0] * 3 + [144] * 4 + [288] * 4 + [432]
    assert trainer.state.num_input_tokens_seen == 0  # the main run's own count is its own
    assert "overtrained 3 times: 9 extra batches, 432 extra tokens" in summary_text(history)


def test_padding_is_not_counted(arguments):
    from support.words import word_tokenizer
    from transformers import DataCollatorForLanguageModeling

    lengths = [3 + number % 9 for number in range(12)]
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(max_steps=2, overtrain_steps=1, overtrain_batches=3, lr_scheduler_type="constant"),
        train_dataset=[{"input_ids": [7] * length} for length in lengths],
        data_collator=DataCollatorForLanguageModeling(word_tokenizer()),
    )
    trainer.train()
    assert trainer.neuron_table().overtrain_tokens == 2 * sum(lengths)  # the 12 samples, twice


def test_works_on_a_stock_trainer(tmp_path, train):
    """The same weights as with a RecyclingTrainer: the masks are fixed, so only the order is random."""
    args = TrainingArguments(
        output_dir=str(tmp_path / "stock"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    callback = OvertrainingCallback(steps=2, batches=2, subset="largest", fraction=0.5)
    data = masked_sentences()
    stock = Trainer(model=tiny_bert(0.0), args=args, train_dataset=data, callbacks=[callback])
    stock.train()
    assert callback.table.overtrain_tokens == 3 * 2 * 4 * 12
    ours = train(
        data=data,
        collator=default_data_collator,
        model=tiny_bert(0.0),
        max_steps=6,
        masked_head=False,
        adam_epsilon=1e-3,  # large, so that Adam does not blow up the rounding of gradients that are zero
        lr_scheduler_type="constant",
        overtrain_steps=2,
        overtrain_batches=2,
        overtrain_subset="largest",
        overtrain_fraction=0.5,
    )
    for name, value in stock.model.state_dict().items():
        torch.testing.assert_close(value, ours.model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant, train):
    """A reentrant checkpoint gives no gradients where none of its inputs requires any; another one compares what it
    computes again, the last block at the masked positions among it."""
    settings = {"max_steps": 4, "lr_scheduler_type": "constant", "adam_epsilon": 1e-3, **OVERTRAINING}
    plain = train("plain", model=tiny_bert(0.0), **settings)
    checkpointing = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    checkpointed = train("checkpointed", model=tiny_bert(0.0), **settings, **checkpointing)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
