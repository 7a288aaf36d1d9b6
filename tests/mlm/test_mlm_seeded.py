"""Any collator, with random numbers that depend on seed, epoch and example alone."""

import copy
import pickle
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
    DataCollatorWithPadding,
)
from transformers.trainer_utils import RemoveColumnsCollator

from hf_recycle.batches.clock import TrainingClock
from hf_recycle.batches.numbered import Numbered, NumberedDataset
from hf_recycle.batches.seeded import SeededCollator
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator


class Dice:
    """A collator that throws one die of each kind of global generator, and some of its own."""

    def __init__(self):
        self.own = torch.Generator().manual_seed(5)
        self.generator = random.Random(5)
        self.numbers = np.random.default_rng(5)
        self.old = np.random.RandomState(5)

    def __call__(self, examples):
        dice = [random.random(), float(np.random.random()), torch.rand(()).item()]  # noqa: NPY002
        own = [torch.rand((), generator=self.own).item(), self.generator.random(), self.numbers.random()]
        return torch.tensor([*dice, *own, self.old.random_sample()], dtype=torch.float64)


class Span(DataCollatorForLanguageModeling):
    """A user's masking: for each row a share of its own, then tokens by that share."""

    def torch_mask_tokens(self, inputs, special_tokens_mask=None, offset_mapping=None):
        labels = inputs.clone()
        share = torch.rand(len(inputs))[:, None]
        chosen = (torch.empty(inputs.shape).uniform_() < share) & torch.zeros(inputs.shape).bernoulli_(0.8).bool()
        chosen &= inputs >= 5
        words = torch.randint(5, 200, inputs.shape)
        return torch.where(chosen, words, inputs), labels.masked_fill(~chosen, -100)


def whole_words(tokenizer):
    with pytest.warns(UserWarning, match="Random token replacement"):
        return DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, mlm_probability=0.5)


def patched(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    stock = collator.torch_mask_tokens
    collator.torch_mask_tokens = lambda inputs, **kwargs: stock(inputs, **kwargs)
    return collator


def examples(count: int = 12) -> list[dict]:
    """Ragged; every fifth one is the same."""
    result = []
    for number in range(count):
        length = 6 + number % 5
        ids = [2, *range(10, 8 + length), 3]
        result.append({"input_ids": ids, "special_tokens_mask": [1] + [0] * (length - 2) + [1]})
    return result


def equal_examples(count: int = 12) -> list[dict]:
    """All the same, with words of two tokens, which the stock collator can't pad."""
    offsets = [(3 * i + i % 2, 3 * i + 3) for i in range(6)]
    return [{**row, "offset_mapping": offsets} for row in examples(5 * count)[::5]]


def numbered(rows, epoch=0, start=0):
    return [Numbered(epoch, start + number, row) for number, row in enumerate(rows)]


PER_EXAMPLE = {
    "stock": lambda t: DataCollatorForLanguageModeling(t, mlm_probability=0.3),
    "stock with a seed": lambda t: DataCollatorForLanguageModeling(t, mlm_probability=0.3, seed=3),
    "patched": patched,
    "a user's masking": Span,
    "whole words": whole_words,
    "ours": MaskedLanguageModelingCollator,
}


def by_row(batch, rows) -> list[tuple]:
    """Inputs and labels of each row, padding taken off."""
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    result = []
    for inputs, labels, mask, row in zip(batch["input_ids"], batch["labels"], masks, rows, strict=True):
        assert int(mask.sum()) == len(row["input_ids"])
        result.append((inputs[mask].tolist(), labels[mask].tolist()))
    return result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", PER_EXAMPLE)
def test_a_mask_does_not_depend_on_the_batch(make_tokenizer, kind, side):
    rows = equal_examples() if kind == "whole words" else examples()
    inner = PER_EXAMPLE[kind](make_tokenizer(padding_side=side))
    items = numbered(copy.deepcopy(rows))
    whole = by_row(SeededCollator(inner, 1)(copy.deepcopy(items)), rows)
    again = SeededCollator(inner, 1)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    for start in range(0, len(order), 5):
        torch.manual_seed(start)
        part = order[start : start + 5]
        batch = again([copy.deepcopy(items[i]) for i in part])
        assert by_row(batch, [rows[i] for i in part]) == [whole[i] for i in part]
    assert len({str(row) for row, example in zip(whole, rows, strict=True) if example == rows[0]}) > 1
    for other in (SeededCollator(inner, 2)(copy.deepcopy(items)), SeededCollator(inner, 1)(numbered(rows, epoch=1))):
        assert by_row(other, rows) != whole


KINDS = PER_EXAMPLE | {
    "dice": lambda t: Dice(),
    "dice with columns removed": lambda t: RemoveColumnsCollator(Dice(), ["input_ids"]),
    "bound method": lambda t: Dice().__call__,
    "numpy": lambda t: DataCollatorForLanguageModeling(t, return_tensors="np"),
    "numpy with a seed": lambda t: DataCollatorForLanguageModeling(t, return_tensors="np", seed=3),
    "permutation": lambda t: (
        lambda rows: DataCollatorForPermutationLanguageModeling(t)([{"input_ids": row["input_ids"]} for row in rows])
    ),
}


def content(batch) -> str:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return str([np.asarray(value).tolist() for value in values])


def global_state() -> tuple:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_seed_epoch_and_examples(tokenizer, kind, caplog):
    rows = equal_examples()
    inner = KINDS[kind](tokenizer)

    def collate(collator, epoch=0, start=0):
        return content(collator(numbered(copy.deepcopy(rows), epoch, start)))

    collator, before = SeededCollator(inner, 1), global_state()
    first = collate(collator)
    assert global_state() == before
    assert "can't be reached" not in caplog.text
    torch.manual_seed(1)
    random.seed(1)
    others = [collate(collator, start=7), collate(collator, epoch=1), collate(SeededCollator(inner, 2))]
    assert first not in others
    assert collate(collator) == first
    assert collate(SeededCollator(KINDS[kind](tokenizer), 1)) == first


def test_generators_of_the_collator_are_as_they_were():
    dice, twin = Dice(), Dice()
    SeededCollator(dice, 1)(numbered(examples()))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    after = dice([])
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    assert torch.equal(after, twin([]))


def test_the_state_is_restored_after_an_error():
    def breaks(_):
        random.random()
        torch.rand(3)
        raise RuntimeError("broken")

    before = global_state()
    with pytest.raises(RuntimeError, match="broken"):
        SeededCollator(breaks, 0)(numbered(examples()))
    assert global_state() == before


class Hidden:
    """A collator whose generator is nowhere to be found, or that counts."""

    def __init__(self, draw):
        self.draws = [draw]

    def __call__(self, rows):
        return {"x": torch.tensor([self.draws[0]() for _ in rows])}


class Count:
    calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


@pytest.mark.parametrize("draw", [random.Random(3).random, Count()], ids=["generator", "counter"])
def test_randomness_out_of_reach_is_said_once(draw, caplog):
    collator = SeededCollator(Hidden(draw), 0)
    collator(numbered(examples()))
    collator(numbered(examples()))
    assert caplog.text.count("Hidden makes another batch of the same examples") == 1
    assert "will not equal it to the bit" in caplog.text


def test_settings_are_read_at_each_call(tokenizer):
    inner = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.0)
    collator = SeededCollator(inner, 0)
    shares = []
    for share in (0.0, 1.0):
        inner.mlm_probability = share
        batch = collator(numbered([{"input_ids": list(range(5, 30))}]))
        shares.append(float((batch["labels"] != -100).float().mean()))
    assert shares == [0, 1]
    inner.mlm_probability = 1.5
    with pytest.raises(RuntimeError):  # as the stock one
        collator(numbered([{"input_ids": list(range(5, 30))}]))


def test_shares_are_those_of_the_stock_collator(tokenizer):
    rows = [{"input_ids": list(range(5, 195))} for _ in range(400)]
    ids = torch.tensor([row["input_ids"] for row in rows])
    inner = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.3, mask_replace_prob=0.5, random_replace_prob=0.3
    )
    batch = SeededCollator(inner, 0)(numbered(rows))
    chosen = batch["labels"] != -100
    inputs = batch["input_ids"][chosen]
    found = [chosen.float().mean(), (inputs == 4).float().mean(), (inputs == ids[chosen]).float().mean()]
    # 76,000 tokens, 22,800 of them chosen: five standard deviations.
    assert torch.allclose(torch.tensor(found), torch.tensor([0.3, 0.5 + 0.3 / 200, 0.2 + 0.3 / 200]), atol=0.017)
    drawn = inputs[(inputs != 4) & (inputs != ids[chosen])]
    assert abs(drawn.float().mean() - 99.5) < 5 * 57.7 / len(drawn) ** 0.5
    # Places and rows are independent of one another.
    for shift in (chosen[:, 1:] & chosen[:, :-1], chosen[1:] & chosen[:-1]):
        assert abs(shift.float().mean() - 0.09) < 5 * (0.09 / shift.numel()) ** 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_in_data_workers(tokenizer, workers):
    data, epoch = examples(64), TrainingClock()
    inner = DataCollatorForLanguageModeling(tokenizer, seed=3)
    loader = DataLoader(
        NumberedDataset(data, epoch, 1),
        batch_size=8,
        collate_fn=SeededCollator(inner, 1),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for number in (0, 1):
        epoch.set_epoch(number)
        batches = [content(batch) for batch in loader]
        expected = [content(SeededCollator(inner, 1)(numbered(data[i : i + 8], number, i))) for i in range(0, 64, 8)]
        assert batches == expected


def test_copies(tokenizer):
    collator = SeededCollator(DataCollatorForLanguageModeling(tokenizer), 4)
    rows = numbered(examples()[::5])
    for clone in (copy.deepcopy(collator), pickle.loads(pickle.dumps(collator))):
        assert content(clone(rows)) == content(collator(rows))


def test_collators_without_randomness_give_what_they_gave(tokenizer):
    rows = [{"input_ids": row["input_ids"]} for row in examples()]
    for collator in (DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorWithPadding(tokenizer)):
        assert content(SeededCollator(collator, 0)(numbered(rows))) == content(collator(rows))
