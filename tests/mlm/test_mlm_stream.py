"""A stream without end, pass after pass."""

from itertools import islice

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.mlm.passes import PASS_COLUMN
from hf_recycle.mlm.stream import EndlessStream

COUNTS = {0: 3, 1: 41}  # uneven shards, so that two data workers soon are in different passes


def shards(shard: list[int], counts: dict[int, int]):
    for s in shard:
        for i in range(counts[s]):
            yield {"row": 100 * s + i}


def streamed(counts=COUNTS, shuffle=True) -> datasets.IterableDataset:
    arguments = {"shard": list(counts), "counts": counts}
    dataset = datasets.IterableDataset.from_generator(shards, gen_kwargs=arguments)
    return dataset.shuffle(seed=5, buffer_size=100) if shuffle else dataset


def first(stream, count: int, workers: int = 0) -> list[tuple[int, int]]:
    """(pass, row) of the first samples of a DataLoader."""
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    return [(int(sample[PASS_COLUMN]), int(sample["row"])) for sample in islice(loader, count)]


class Signed(IterableDataset):
    """A stream whose samples say which data worker they come from."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        worker = get_worker_info().id
        return ({**sample, "worker": worker} for sample in self.dataset)


def by_worker(dataset, count: int | None = None) -> list[list[dict]]:
    loader = DataLoader(Signed(dataset), batch_size=None, num_workers=2)
    samples = list(islice(loader, count))
    return [[s for s in samples if s["worker"] == worker] for worker in (0, 1)]


class Lists(IterableDataset):
    """A torch stream that notes its epochs; `rows[p]` is what pass p yields."""

    def __init__(self, rows):
        self.rows, self.epoch, self.epochs = rows, None, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.rows[self.epoch] if self.epoch < len(self.rows) else [])


def test_passes_follow_one_another():
    samples = [{"row": 0}, {"row": 1}]
    dataset = Lists([samples, samples[:1], samples])
    assert list(EndlessStream(dataset)) == [
        {"row": 0, PASS_COLUMN: 0},
        {"row": 1, PASS_COLUMN: 0},
        {"row": 0, PASS_COLUMN: 1},
        {"row": 0, PASS_COLUMN: 2},
        {"row": 1, PASS_COLUMN: 2},
    ]
    assert dataset.epochs == [0, 1, 2, 3]  # the last yields nothing, and ends the stream
    assert samples == [{"row": 0}, {"row": 1}]


def test_plain_iterables_and_no_length():
    stream = EndlessStream([{"row": 7}])
    assert first(stream, 1000) == [(i, 7) for i in range(1000)]
    with pytest.raises(TypeError):
        len(stream)


def test_an_empty_stream_ends():
    assert list(EndlessStream([])) == []


def test_a_stream_that_can_be_read_once_ends():
    assert [s["row"] for s in EndlessStream(iter([{"row": 1}, {"row": 2}]))] == [1, 2]


@pytest.mark.parametrize("sample", [[1, 2], "text", torch.tensor([1])])
def test_samples_that_are_no_mappings_are_refused(sample):
    with pytest.raises(TypeError, match=f"not a {type(sample).__name__}"):
        next(iter(EndlessStream([sample])))


def test_every_pass_is_shuffled_anew_as_set_epoch_would():
    total = sum(COUNTS.values())
    seen = first(EndlessStream(streamed()), 3 * total)
    for number in range(3):
        dataset = streamed()
        dataset.set_epoch(number)
        assert seen[number * total : (number + 1) * total] == [(number, s["row"]) for s in dataset]
    orders = [[row for p, row in seen if p == number] for number in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_workers_are_each_in_a_pass_of_their_own():
    seen = by_worker(EndlessStream(streamed()), 300)
    passes = []
    for number in range(40):
        dataset = streamed()
        dataset.set_epoch(number)
        passes.append(by_worker(dataset))
    for worker in (0, 1):
        rows = [s["row"] for s in seen[worker]]
        numbers = [s[PASS_COLUMN] for s in seen[worker]]
        expected = [(number, s["row"]) for number in range(40) for s in passes[number][worker]]
        assert list(zip(numbers, rows, strict=True)) == expected[: len(rows)]
        assert len(rows) == 150
    assert seen[0][-1][PASS_COLUMN] != seen[1][-1][PASS_COLUMN]


def test_the_epoch_shared_by_data_workers_is_left_alone():
    # datasets keeps it in shared memory: setting it for one worker would set it for another that is just
    # starting a pass.
    dataset = streamed()
    first(EndlessStream(dataset), 100)
    first(EndlessStream(dataset), 100, workers=2)
    assert dataset.epoch == 0


def test_a_worker_without_a_shard_stops():
    one = {0: 5}
    seen = first(EndlessStream(streamed(one, shuffle=False)), 23, workers=2)
    assert seen == [(i // 5, i % 5) for i in range(23)]
    empty = DataLoader(EndlessStream(streamed({0: 0, 1: 0})), batch_size=None, num_workers=2)
    assert list(empty) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip", [1, 44, 60])
def test_skipping_is_exact(workers, skip):
    whole = first(EndlessStream(streamed()), 130, workers)
    dataset = streamed()
    dataset.set_epoch(3)  # whatever state the dataset was left in
    again = EndlessStream(dataset)
    first(again, 7, workers)
    assert first(again, 130, workers)[skip:] == whole[skip:]


def test_two_iterations_at_once_do_not_disturb_each_other():
    stream = EndlessStream(streamed())
    alone = first(stream, 100)
    slow, fast = iter(stream), iter(stream)
    pairs = [(s[PASS_COLUMN], s["row"]) for s in islice(slow, 20)]
    assert [(s[PASS_COLUMN], s["row"]) for s in islice(fast, 90)] == alone[:90]
    pairs += [(s[PASS_COLUMN], s["row"]) for s in islice(slow, 80)]
    assert pairs == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_masks_anew(tokenizer, workers):
    sample = {"input_ids": list(range(5, 105))}
    collator = MaskedLanguageModelingCollator(tokenizer, seed=1)
    loader = DataLoader(EndlessStream([sample]), batch_size=4, collate_fn=collator, num_workers=workers)
    batches = list(islice(loader, 2))
    assert set(batches[0]) == {"input_ids", "labels"}
    for index, batch in enumerate(batches):
        # each worker reads the whole list: batch i comes from worker i
        start = 4 * index if workers == 0 else 0
        for i in range(4):
            collator.set_pass(start + i)
            assert torch.equal(batch["labels"][i], collator([sample])["labels"][0])
    assert len(batches[0]["labels"].unique(dim=0)) == 4
