"""Interrupted and resumed equals uninterrupted, bit for bit."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from support.tiny_runs import assert_same_weights, end_workers, losses, run, sentences, tiny_bert
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

from hf_recycle import RecyclingHistory, RecyclingTrainer
from hf_recycle.checkpoints.file_list import LIST_FILE
from hf_recycle.records.files import RecyclingFileError

EVERYTHING = {
    # A phase every 3 steps that takes 3.2 of 32 neurons, so that fractions accumulate; fade-ins last longer than
    # the gap between phases, so that every checkpoint lies in one; immunity.
    "recycle_steps": 3,
    "recycle_fraction": 0.1,
    "recycle_smooth_steps": 4,
    "recycle_immunity": 1,
    "recycle_selection": "random",
    "midpoint_weight": 0.05,
    "magnitude_steps": 2,
}
METHODS = {
    "off": {},
    "plain": {"recycle_steps": 3, "recycle_fraction": 0.1},
    "matched_normal": {"recycle_steps": 3, "recycle_fraction": 0.1, "recycle_reinit": "matched_normal"},
    "copy_noise global": {
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_reinit": "copy_noise",
        "recycle_scope": "global",
    },
    "everything": EVERYTHING,
}


def assert_same_run(whole, resumed, folder_whole, folder_resumed):
    assert_same_weights(whole, resumed)
    assert losses(whole) == losses(resumed)
    first, second = (RecyclingHistory.from_pretrained(folder) for folder in (folder_whole, folder_resumed))
    assert first.events.astype(str).equals(second.events.astype(str))
    assert first.magnitudes.astype(str).equals(second.magnitudes.astype(str))
    for block, counts in first.counts.items():
        assert (counts == second.counts[block]).all()


class SaveAt(TrainerCallback):
    """Saves after these steps; the Trainer saves after the last one."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step in self.steps


def saved_at(*steps: int) -> dict:
    return {"save_strategy": "steps", "save_steps": 1000, "callbacks": [SaveAt(*steps)]}


def interrupt_and_compare(train, at: int, **settings):
    """A run to the end, and one that is stopped at step `at` and resumed by a new trainer."""
    settings = saved_at(at) | settings
    whole = train("whole", **settings)
    partial = Path(whole.args.output_dir).with_name("resumed")
    shutil.copytree(Path(whole.args.output_dir, f"checkpoint-{at}"), partial / f"checkpoint-{at}")
    resumed = train("resumed", resume=True, **settings)
    assert resumed.state.global_step == whole.state.global_step
    last = f"checkpoint-{whole.state.global_step}"
    assert_same_run(whole, resumed, Path(whole.args.output_dir, last), partial / last)
    return whole, resumed


@pytest.mark.parametrize(
    ("at", "method"),
    [
        *((5, method) for method in METHODS),
        # Before the first phase, and between the last one and the end of an epoch.
        *(
            pytest.param(at, name, marks=pytest.mark.slow)
            for at in (1, 11)
            for name in ("everything", "copy_noise global")
        ),
    ],
)
def test_resume_is_exact(method, at, train):
    """48 samples in batches of 4: the second pass over the data begins at step 12, the third at 24."""
    whole, _ = interrupt_and_compare(train, at, max_steps=15, **METHODS[method])
    if method == "everything":
        assert whole.recycling.table.phases == 4


@pytest.mark.parametrize("at", [12, *(pytest.param(at, marks=pytest.mark.slow) for at in (13, 20))])
def test_resume_is_exact_at_and_after_the_end_of_a_pass(at, train):
    interrupt_and_compare(train, at, max_steps=26, **EVERYTHING)


class Terminated(RecyclingTrainer):
    """SIGTERM comes while the sixth step computes."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 5:
            found = (callback for callback in self.callback_handler.callbacks if hasattr(callback, "jit_manager"))
            next(found).jit_manager.is_checkpoint_requested = True
        return super().training_step(*args, **kwargs)


def test_resume_is_exact_after_a_termination(train):
    """With `enable_jit_checkpoint`, and a phase at the end of that step."""
    whole = train("whole", **EVERYTHING)
    stopped = train("run", cls=Terminated, enable_jit_checkpoint=True, **EVERYTHING)
    assert stopped.state.global_step == 6
    resumed = train("run", resume=True, **EVERYTHING)
    assert_same_weights(whole, resumed)
    assert losses(whole) == losses(resumed)


def ragged(count: int = 48) -> list[dict]:
    return [{"input_ids": row["input_ids"][: 6 + number % 7]} for number, row in enumerate(sentences(count))]


def a_stream(shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(sentences()).to_iterable_dataset(num_shards=shards).shuffle(seed=3, buffer_size=8)


def random_crops() -> datasets.Dataset:
    """A dataset that draws."""

    def crop(batch):
        return {"input_ids": [row[random.randrange(4) :] for row in batch["input_ids"]]}

    return datasets.Dataset.from_list(sentences()).with_transform(crop)


class Shuffled(IterableDataset):
    """A stream that shuffles and crops by the global generator."""

    def __iter__(self):
        rows = sentences()
        random.shuffle(rows)
        for row in rows:
            yield {"input_ids": row["input_ids"][random.randrange(4) :]}


class OwnOrder(RecyclingTrainer):
    """A sampler of the user's with a generator of its own, in a loader of the user's."""

    def get_train_dataloader(self):
        sampler = WeightedRandomSampler([1.0, 2.0] * 24, 48, generator=torch.Generator().manual_seed(5))
        loader = DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


EVALUATED = {"evaluation": sentences(8, seed=9), "eval_strategy": "steps", "eval_steps": 9}
WAYS = {
    "grouped by length": {"data": ragged(), "train_sampling_strategy": "group_by_length"},
    "not seedable": {"accelerator_config": {"use_seedable_sampler": False}},
    "random dataset": {"data": random_crops(), "remove_unused_columns": False},
    "random dataset, workers": {
        "data": random_crops(),
        "remove_unused_columns": False,
        "dataloader_num_workers": 1,
    },
    "own order": {"cls": OwnOrder},
    "workers, evaluated": {"dataloader_num_workers": 1, **EVALUATED},
    "persistent workers, evaluated": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        **EVALUATED,
    },
    "stream": {"data": a_stream()},
    "stream, evaluated each epoch": {"data": a_stream(), **EVALUATED, "eval_strategy": "epoch"},
    "stream that draws": {"data": Shuffled()},
    "stream that draws, workers": {"data": Shuffled(), "dataloader_num_workers": 2},
    "stream of shards, workers": {"data": a_stream(3), "dataloader_num_workers": 2},
    "stream, persistent workers": {
        "data": a_stream(3),
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
    },
    "stream, accumulated": {"data": a_stream(), "gradient_accumulation_steps": 5, "per_device_train_batch_size": 1},
}
QUICK = ("grouped by length", "stream")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_resume_is_exact_in_a_later_epoch(way, train):
    """48 examples in batches of 4: epochs begin after steps 12 and 24. Interrupted where one ends and in the next."""
    stops = (15,) if way in QUICK else (12, 15)
    settings = {"max_steps": 27, **saved_at(*stops), **METHODS["plain"], **WAYS[way]}
    whole = train("whole", **settings)
    for at in stops:
        resumed = train(f"resumed-{at}", resume=f"{whole.args.output_dir}/checkpoint-{at}", **settings)
        assert resumed.state.global_step == 27
        assert_same_run(whole, resumed, *(f"{run.args.output_dir}/checkpoint-27" for run in (whole, resumed)))
        assert [row.get("epoch") for row in whole.state.log_history] == [
            row.get("epoch") for row in resumed.state.log_history
        ]
        end_workers(resumed)
    end_workers(whole)


@pytest.mark.slow
def test_resume_is_exact_with_accumulation_and_sparse_logging(train):
    """The loss logged at step 10 is the mean over steps 6 to 10, on both sides of a checkpoint at step 8."""
    whole, resumed = interrupt_and_compare(
        train, 8, max_steps=12, gradient_accumulation_steps=3, logging_steps=5, per_device_train_batch_size=2
    )
    # What is reported at the end is the mean over the steps of the call: the last four here.
    per_step = train("every", max_steps=12, gradient_accumulation_steps=3, per_device_train_batch_size=2)
    assert whole.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses(per_step)) / 12, rel=1e-5)
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses(per_step)[8:]) / 4, rel=1e-5)


def test_resume_is_exact_with_a_collator_of_another_kind(train, tokenizer):
    class Backwards(DataCollatorForLanguageModeling):
        """Draws from the global random state, as whole-word masking does, and is not the stock class."""

    interrupt_and_compare(train, 7, collator=Backwards(tokenizer), **EVERYTHING)


def test_a_larger_max_steps_goes_on(train):
    """Up to the old end the two runs are one; the schedules of the learning rate must not depend on max_steps."""
    settings = {"lr_scheduler_type": "constant", **METHODS["plain"]}
    short = train("run", max_steps=8, **saved_at(), **settings)
    longer = train("run", max_steps=14, resume=True, **settings)
    whole = train("whole", max_steps=14, **settings)
    assert longer.state.global_step == 14
    assert losses(short) == losses(whole)[:8]
    assert_same_weights(longer, whole)


def test_load_best_model_restores_the_neurons_of_that_checkpoint(train):
    trainer = train(
        evaluation=sentences(8, seed=9),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is an early one
        learning_rate=5e-2,
        **METHODS["plain"],
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-12"
    assert best.parent == Path(trainer.args.output_dir)
    saved = RecyclingHistory.from_pretrained(best)
    for name, counts in trainer.neuron_table().counts.items():
        assert counts.tolist() == saved.counts[name].tolist()
    trainer.save_model(str(best.parent / "final"))
    again = RecyclingHistory.from_pretrained(best.parent / "final")
    assert again.events.astype(str).equals(saved.events.astype(str))
    # So says the card, and what is evaluated from here on belongs to that step too.
    step = int(best.name.removeprefix("checkpoint-"))
    assert again.stats["step"] == saved.stats["step"] == step
    assert f"after {step} optimizer steps" in (best.parent / "final" / "README.md").read_text()
    trainer.evaluate()
    assert trainer.recorder.to_table()["step"].to_pylist()[-1] == step
    # Time and tokens are those of the whole run.
    last = RecyclingHistory.from_pretrained(best.parent / "checkpoint-12")
    assert again.config["run"]["tokens"] == last.config["run"]["tokens"] > saved.config["run"]["tokens"]
    assert again.config["run"]["seconds"] >= last.config["run"]["seconds"]


def test_model_init_starts_with_fresh_neurons(arguments, tokenizer):
    trainer = RecyclingTrainer(
        model_init=lambda: tiny_bert(),
        args=arguments(**METHODS["plain"]),
        train_dataset=sentences(),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    trainer.train()
    first, events = {n: c.clone() for n, c in trainer.neuron_table().counts.items()}, len(trainer.recorder.to_table())
    trainer.train()
    assert all(torch.equal(counts, first[name]) for name, counts in trainer.neuron_table().counts.items())
    assert len(trainer.recorder.to_table()) == events


def test_a_stock_checkpoint_resumes_with_recycling_switched_on(arguments, tokenizer, train):
    stock = Trainer(
        model=tiny_bert(),
        args=arguments(save_strategy="steps", save_steps=4),
        train_dataset=sentences(),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    stock.train()
    resumed = train("next", resume=f"{stock.args.output_dir}/checkpoint-4", **METHODS["plain"])
    assert {row["step"] for row in resumed.recorder.to_table().to_pylist() if row["kind"] == "phase"} == {6, 9}
    assert sum(int(counts.sum()) for counts in resumed.neuron_table().counts.values()) > 0


def test_a_recycling_checkpoint_resumes_in_the_stock_trainer(arguments, tokenizer, train):
    ours = train(save_strategy="steps", save_steps=5, **EVERYTHING)
    stock = Trainer(
        model=tiny_bert(),
        args=arguments("stock"),
        train_dataset=sentences(),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    stock.train(resume_from_checkpoint=f"{ours.args.output_dir}/checkpoint-5")
    assert stock.state.global_step == 12


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(folder, max_steps=5, **saved_at(), **EVERYTHING)
    return folder / "checkpoint-5"


@pytest.fixture
def checkpoint(trained_checkpoint, tmp_path):
    """A checkpoint in mid-transition, to be spoilt."""
    return shutil.copytree(trained_checkpoint, tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"recycle_fraction": 0.2}, "recycle_fraction=0.1 (now 0.2)"),
        ({"recycle_steps": None}, "recycle_steps=3"),
        ({"midpoint_log": True}, "midpoint_log=False (now True)"),
    ],
)
def test_contradicting_settings_are_named(change, field, train, checkpoint):
    with pytest.raises(RecyclingFileError) as error:
        train(resume=str(checkpoint), **(EVERYTHING | change))
    assert field in str(error.value)


def test_another_shape_is_named(train, checkpoint):
    folder = checkpoint
    config = json.loads((folder / "recycling_config.json").read_text())
    config["blocks"][1]["num_neurons"] = 31
    (folder / "recycling_config.json").write_text(json.dumps(config))
    (folder / LIST_FILE).unlink()
    with pytest.raises(RecyclingFileError, match=r"31 neurons in block 'bert.encoder.layer.1' and the model has 32"):
        train(resume=str(folder), **EVERYTHING)


@pytest.mark.parametrize(
    "name",
    ["recycling_config.json", "recycling_state.safetensors", "recycling_history.parquet", "recycling_stats.json"],
)
@pytest.mark.parametrize("damage", ["absent", "truncated", "garbage"])
def test_damaged_files_are_refused(name, damage, train, checkpoint):
    path = checkpoint / name
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"\x80\x04garbage" * 50)
    with pytest.raises(RecyclingFileError, match=name):
        train(resume=str(checkpoint), **EVERYTHING)


def test_a_hand_edited_state_is_refused(train, checkpoint):
    """Well-formed, and contradicting the history."""
    from hf_recycle.records.files import read_state, write_state

    folder = checkpoint
    tensors = read_state(folder)
    for column in ("counts", "last_phase", "last_step"):
        key = f"bert.encoder.layer.0/{column}"
        tensors[key] = tensors[key].roll(1)
    write_state(folder, tensors)
    (folder / LIST_FILE).unlink()
    with pytest.raises(RecyclingFileError, match=r"counts of block bert.encoder.layer.0 .* contradicts"):
        train(resume=str(folder), **EVERYTHING)


def test_a_checkpoint_loads_with_plain_transformers(train):
    """In mid-fade-in the parameters hold the effective weights: those that were evaluated."""
    from transformers import AutoModelForMaskedLM

    trainer = train(max_steps=8, save_strategy="steps", save_steps=8, evaluation=sentences(8, seed=9), **EVERYTHING)
    assert trainer.neuron_table().fading_in
    loaded = AutoModelForMaskedLM.from_pretrained(f"{trainer.args.output_dir}/checkpoint-8")
    for (name, a), b in zip(trainer.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
