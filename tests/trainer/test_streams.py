"""Streams: epochs that begin and end, every example once, and resuming without reading again."""

import random
import threading
from pathlib import Path

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from support.tiny_runs import assert_same_weights, losses, sentences, tiny_bert
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

from hf_recycle import RecyclingTrainer
from hf_recycle.batches.stream_state import can_resume

PLAIN = {"recycle_steps": 3, "recycle_fraction": 0.1}


class Rows(IterableDataset):
    """Torch's kind, with a length or without."""

    def __init__(self, rows, length=False):
        self.rows, self.read = rows, 0
        if length:
            self.__class__ = RowsWithLength

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


class RowsWithLength(Rows):
    def __len__(self):
        return len(self.rows)


class Epochs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(train_dataloader.dataset.epoch + 1)
        self.seen.append(("begin", state.global_step, isinstance(train_dataloader.dataset, IterableDataset)))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seen.append(("end", state.global_step, state.epoch))


def note_examples(trainer) -> list[tuple]:
    """The tokens of every training example, masks taken back, as the steps come."""
    seen, step = [], trainer.training_step

    def spy(model, inputs, *args, **kwargs):
        whole = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        seen.extend(map(tuple, whole.tolist()))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = spy
    return seen


KINDS = {
    "without length": lambda: Rows(sentences(16)),
    "with length": lambda: Rows(sentences(16), length=True),
    "of datasets": lambda: datasets.Dataset.from_list(sentences(16)).to_iterable_dataset(num_shards=2),
    "that can't be copied": lambda: (
        datasets.Dataset.from_list(sentences(16))
        .to_iterable_dataset()
        .map(lambda row, lock: row, fn_kwargs={"lock": threading.Lock()})
    ),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if "copied" in kind else pytest.mark.slow) for kind in KINDS]
)
def test_epochs_are_those_of_the_stock_trainer(kind, arguments, tokenizer):
    runs = []
    for cls, folder in ((Trainer, "stock"), (RecyclingTrainer, "ours")):
        epochs = Epochs()
        trainer = cls(
            model=tiny_bert(),
            args=arguments(folder, max_steps=12, save_strategy="epoch"),
            train_dataset=KINDS[kind](),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
            callbacks=[epochs],
        )
        examples = note_examples(trainer)
        trainer.train()
        saved = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
        runs.append((saved, [entry[:2] for entry in epochs.seen], examples))
        assert all(entry[2] for entry in epochs.seen if entry[0] == "begin")
    assert runs[0] == runs[1]
    assert len(runs[1][0]) == 3
    every = sorted(tuple(row["input_ids"]) for row in sentences(16))
    for start in (0, 16, 32):
        assert sorted(runs[1][2][start : start + 16]) == every
    assert [entry[2] for entry in epochs.seen if entry[0] == "end"][:2] == [1, 2]


class Counted(Rows):
    """A stream of the user's that can be told where to go on."""

    def __init__(self, rows):
        super().__init__(rows)
        self.place, self.start = 0, 0

    def __iter__(self):
        self.place, self.start = self.start, 0
        for row in self.rows[self.place :]:
            self.read += 1
            self.place += 1
            yield row

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.start = state["place"]


def counted_by_datasets(rows):
    stream = Rows([])

    def read(row):
        stream.read += 1
        return row

    mapped = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3).map(read)
    mapped.counter = stream
    return mapped


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Counted, counted_by_datasets])
def test_a_stream_that_has_a_state_is_not_read_again(kind, train):
    """Ten batches an epoch: resumed in the first and in the second one."""
    settings = {"max_steps": 24, "save_strategy": "steps", "save_steps": 6, **PLAIN}
    whole = train("whole", data=kind(sentences(40)), **settings)
    for at, read in ((6, 40 - 24 + 40 + 16), (18, 40 - 32 + 16)):
        stream = kind(sentences(40))
        resumed = train(f"resumed-{at}", data=stream, resume=f"{whole.args.output_dir}/checkpoint-{at}", **settings)
        assert_same_weights(whole, resumed)
        assert losses(whole) == losses(resumed)
        assert read <= getattr(stream, "counter", stream).read <= read + 8  # a loader reads ahead


def test_a_state_that_can_not_be_read_again_is_not_saved(train, said):
    class Random(Counted):
        def state_dict(self):
            return {"place": self.place, "random": random.Random(0)}

    whole = train("whole", data=Random(sentences(40)), max_steps=4, save_strategy="steps", save_steps=2, **PLAIN)
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    assert not (checkpoint / "stream_state.pt").exists()
    assert any("state_dict of Random" in text and "reads the stream again" in text for text in said())
    stream = Random(sentences(40))
    resumed = train("resumed", data=stream, resume=str(checkpoint), max_steps=4, **PLAIN)
    assert_same_weights(whole, resumed)


def test_shuffle_buffers_have_no_exact_state():
    plain = datasets.Dataset.from_list(sentences(16)).to_iterable_dataset(num_shards=2)
    assert can_resume(plain.map(lambda row: row).filter(lambda row: True).skip(2).take(8))
    assert not can_resume(plain.shuffle(seed=0, buffer_size=4))
    assert not can_resume(plain.shuffle(seed=0, buffer_size=4).map(lambda row: row))
    assert not can_resume(datasets.interleave_datasets([plain, plain.shuffle(seed=0)]))
    assert not can_resume(plain.with_format("arrow"))
    assert not can_resume(Rows([]))


@pytest.mark.parametrize(
    ("change", "message"),
    [("split", "was split by split_dataset_by_node"), ("evaluated", "dispatch_batches=False can't evaluate")],
)
def test_streams_that_would_lose_or_repeat_examples_are_refused(change, message, arguments, tokenizer, monkeypatch):
    stream = datasets.Dataset.from_list(sentences(16)).to_iterable_dataset(num_shards=2)
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(accelerator_config={"dispatch_batches": False}),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        train_dataset=split_dataset_by_node(stream, rank=0, world_size=2),
        eval_dataset=stream,
    )
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match=message):
        trainer.get_train_dataloader() if change == "split" else trainer.get_eval_dataloader()
