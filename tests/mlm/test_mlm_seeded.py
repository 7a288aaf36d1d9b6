"""Any collator under a random state of its own."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.mlm.passes import PASS_COLUMN
from hf_recycle.mlm.seeded import SeededCollator, reproducible


class Dice:
    """A collator that throws one die of each kind of global generator."""

    def __call__(self, examples):
        self.columns = [sorted(e) for e in examples if isinstance(e, dict)]
        dice = [random.random(), float(np.random.random()), torch.rand(()).item()]  # noqa: NPY002
        return torch.tensor(dice, dtype=torch.float64)


class OwnDie:
    """A collator with a torch generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, examples):
        return torch.rand(3, generator=self.generator)


def global_state() -> tuple:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


def examples(*firsts: int) -> list[dict]:
    return [{"input_ids": list(range(first, first + 12))} for first in firsts]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def whole_words(tokenizer):
    with pytest.warns(UserWarning, match="Random token replacement"):
        return DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, mlm_probability=0.5)


def with_offsets(*firsts: int) -> list[dict]:
    offsets = [(3 * i + i % 2, 3 * i + 3) for i in range(12)]
    return [{**e, "offset_mapping": offsets, "special_tokens_mask": [1] + [0] * 10 + [1]} for e in examples(*firsts)]


KINDS = {
    "dice": (lambda t: Dice(), examples),
    "own generator": (lambda t: OwnDie(), examples),
    "seeded stock": (lambda t: DataCollatorForLanguageModeling(t, seed=3), examples),
    "seeded stock numpy": (
        lambda t: lambda e: torch.from_numpy(DataCollatorForLanguageModeling(t, return_tensors="np")(e)["input_ids"]),
        examples,
    ),
    "whole words": (whole_words, with_offsets),
    "permutation": (
        lambda t: lambda e: DataCollatorForPermutationLanguageModeling(t)(e)["perm_mask"],
        examples,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_seed_pass_and_batch(tokenizer, kind):
    build, group = KINDS[kind]
    collator = SeededCollator(build(tokenizer), seed=1)
    batch = group(5, 40, 80, 120)
    torch.manual_seed(0)
    first = collator(batch)
    collator(group(6, 41, 81, 121))  # other batches in between leave no trace
    torch.manual_seed(1)
    assert same(collator(batch), first)
    assert same(SeededCollator(build(tokenizer), seed=1)(batch), first)
    assert not same(SeededCollator(build(tokenizer), seed=2)(batch), first)
    assert not same(collator(group(5, 40, 80, 121)), first)
    collator.set_pass(1)
    assert not same(collator(batch), first)
    collator.set_pass(0)
    assert same(collator(batch), first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_random_state_is_unchanged(tokenizer, kind):
    build, group = KINDS[kind]
    inner = build(tokenizer)
    collator = SeededCollator(inner, seed=1)
    before = global_state()
    own = getattr(inner, "generator", None)
    own_state = own.get_state() if own is not None else None
    collator(group(5, 40, 80, 120))
    assert global_state() == before
    assert getattr(inner, "generator", None) is own
    assert own is None or torch.equal(own.get_state(), own_state)


def test_the_state_is_restored_after_an_error():
    def breaks(_):
        random.random()
        torch.rand(3)
        raise RuntimeError("broken")

    before = global_state()
    with pytest.raises(RuntimeError, match="broken"):
        SeededCollator(breaks)(examples(5))
    assert global_state() == before


def test_whole_word_masks_are_whole(tokenizer):
    batch = reproducible(whole_words(tokenizer), seed=0)(with_offsets(5, 40, 80, 120))
    masked = (batch["labels"] != -100)[:, 1:-1]
    # By the offsets above, tokens 1 | 2 3 ... pair up as (odd starts a word, even goes on).
    starts = [i for i in range(1, 11) if i % 2 == 1 or i == 1]
    for start in starts[1:]:
        end = start + 1
        if end <= 10 and 3 * end + end % 2 == 3 * start + 3:
            assert (masked[:, start - 1] == masked[:, end - 1]).all()
    assert masked.any()
    assert not masked.all()


def test_pass_column_is_stripped_and_counts():
    dice = Dice()
    collator = SeededCollator(dice)
    tagged = [{**e, PASS_COLUMN: 4} for e in examples(5, 40)]
    result = collator(tagged)
    assert dice.columns == [["input_ids"], ["input_ids"]]
    assert PASS_COLUMN in tagged[0]  # the caller's samples are left alone
    collator.set_pass(4)
    assert same(collator(examples(5, 40)), result)
    collator.set_pass(3)
    assert not same(collator(examples(5, 40)), result)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([{"x": [1, 2]}], [{"x": [1, 3]}]),
        ([{"x": [1, 2]}], [{"y": [1, 2]}]),
        ([{"x": 1.5}], [{"x": 1.25}]),
        ([{"text": "one"}], [{"text": "two"}]),
        ([{"x": [[1], [2, 3]]}], [{"x": [[1, 2], [3]]}]),
        ([{"x": [1, 2]}, {"x": [3]}], [{"x": [1]}, {"x": [2, 3]}]),
        ([[1, 2, 3]], [[1, 2, 4]]),
        ([{"words": ["a", "bc"]}], [{"words": ["ab", "c"]}]),
    ],
)
def test_batches_without_input_ids_are_told_apart(a, b):
    collator = SeededCollator(Dice())
    assert same(collator(a), collator(copy.deepcopy(a)))
    assert not same(collator(a), collator(b))


def test_containers_and_other_columns_do_not_matter():
    collator = SeededCollator(Dice())
    ids = [5, 6, 7]
    result = collator([{"input_ids": ids}])
    for like in (np.array(ids, np.int32), torch.tensor(ids), tuple(ids)):
        assert same(collator([{"input_ids": like}]), result)
    assert same(collator([{"note": object(), "input_ids": ids}]), result)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_data_workers(tokenizer, workers):
    data = [{"input_ids": list(range(i, i + 12)), "special_tokens_mask": [0] * 12} for i in range(5, 69)]
    collator = SeededCollator(DataCollatorForLanguageModeling(tokenizer, seed=3), seed=1)
    loader = DataLoader(data, batch_size=8, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0)
    reference = SeededCollator(DataCollatorForLanguageModeling(tokenizer, seed=3), seed=1)
    for number in (0, 1):
        collator.set_pass(number)
        reference.set_pass(number)
        batches = list(loader)
        for i, batch in enumerate(batches):
            assert same(dict(batch), dict(reference(data[8 * i : 8 * i + 8])))
        assert len(batches) == 8


def test_evaluation_copies_never_change(tokenizer):
    collator = SeededCollator(Dice(), seed=1)
    evaluation = collator.for_evaluation()
    first = evaluation(examples(5, 40))
    evaluation.set_pass(3)
    collator.set_pass(3)
    assert same(evaluation(examples(5, 40)), first)
    assert same(evaluation([{**e, PASS_COLUMN: 2} for e in examples(5, 40)]), first)
    assert same(SeededCollator(Dice(), seed=2).for_evaluation()(examples(5, 40)), first)
    assert not same(collator(examples(5, 40)), first)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(tokenizer, clone):
    collator = SeededCollator(DataCollatorForLanguageModeling(tokenizer), seed=4)
    collator.set_pass(2)
    assert same(clone(collator)(examples(5, 40)), collator(examples(5, 40)))


def test_reproducible_keeps_ours(tokenizer):
    for ours in (MaskedLanguageModelingCollator(tokenizer), SeededCollator(Dice())):
        assert reproducible(ours, seed=3) is ours


def test_reproducible_takes_over_the_stock_settings(tokenizer):
    stock = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.3, mask_replace_prob=0.5, random_replace_prob=0.25, pad_to_multiple_of=8
    )
    ours = reproducible(stock, seed=11)
    assert type(ours) is MaskedLanguageModelingCollator
    settings = ("mlm_probability", "mask_replace_prob", "random_replace_prob", "pad_to_multiple_of")
    assert [getattr(ours, s) for s in settings] == [getattr(stock, s) for s in settings] == [0.3, 0.5, 0.25, 8]
    assert ours.seed == 11
    assert ours.tokenizer is tokenizer
    assert reproducible(DataCollatorForLanguageModeling(tokenizer, seed=5), seed=11).seed == 5


class Subclass(DataCollatorForLanguageModeling):
    pass


def test_reproducible_wraps_everything_else(tokenizer):
    others = [
        whole_words(tokenizer),
        Subclass(tokenizer),
        DataCollatorForLanguageModeling(tokenizer, return_tensors="np"),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        DataCollatorWithPadding(tokenizer),
        default_data_collator,
        Dice(),
    ]
    for other in others:
        wrapped = reproducible(other, seed=6)
        assert type(wrapped) is SeededCollator
        assert (wrapped.collator, wrapped.seed) == (other, 6)
        assert hasattr(wrapped, "tokenizer") == hasattr(other, "tokenizer")  # the Trainer saves it
    assert reproducible(Subclass(tokenizer), seed=0).tokenizer is tokenizer


def test_collators_without_randomness_give_what_they_gave(tokenizer):
    for collator in (
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        DataCollatorWithPadding(tokenizer),
    ):
        tagged = [{**e, PASS_COLUMN: 1} for e in examples(5, 40)]
        assert same(dict(reproducible(collator, 0)(tagged)), dict(collator(examples(5, 40))))
