"""The collator of the command line, with random numbers by example."""

import pytest
import torch
from torch.utils.data import DataLoader

from hf_recycle.batches.clock import TrainingClock
from hf_recycle.batches.numbered import Numbered, NumberedDataset
from hf_recycle.batches.seeded import SeededCollator
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator


def numbered(sequences, epoch=0, of=None):
    return [Numbered(epoch, number, {"input_ids": sequences[number]}) for number in of or range(len(sequences))]


def rows(batch: dict[str, torch.Tensor]) -> list[tuple]:
    """(original tokens, masked tokens, labels) of each row, padding taken off."""
    result = []
    for i, (inputs, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        real = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones_like(inputs).bool()
        original = torch.where(labels == -100, inputs, labels)[real]
        result.append(tuple(tuple(part.tolist()) for part in (original, inputs[real], labels[real])))
        assert (labels[~real] == -100).all()
    return result


def test_padding_by_the_caller_changes_no_mask(tokenizer, sequences):
    collator = SeededCollator(MaskedLanguageModelingCollator(tokenizer), 0)
    alone = [row for item in numbered(sequences) for row in rows(collator([item]))]
    padded = [
        Numbered(0, i, {"input_ids": s + [0] * (40 - len(s)), "attention_mask": [1] * len(s) + [0] * (40 - len(s))})
        for i, s in enumerate(sequences)
    ]
    assert rows(collator(padded)) == alone


class Loaded:
    """A dataset of sequences; a class of the module, so that spawned workers find it."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, i):
        return {"input_ids": self.sequences[i]}


@pytest.mark.parametrize(
    ("workers", "persistent", "context"),
    [
        (0, False, None),
        (2, False, "fork"),
        pytest.param(2, True, "fork"),
        pytest.param(2, True, "spawn", marks=pytest.mark.slow),
    ],
)
def test_masks_in_data_workers_follow_the_epoch(tokenizer, sequences, workers, persistent, context):
    collator, epoch = SeededCollator(MaskedLanguageModelingCollator(tokenizer), 3), TrainingClock()
    loader = DataLoader(
        NumberedDataset(Loaded(sequences), epoch, 3),
        batch_size=8,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=context,
    )
    seen = []
    for number in range(3):
        epoch.set_epoch(number)
        seen.append([row for batch in loader for row in rows(batch)])
        assert seen[number] == rows(collator(numbered(sequences, number)))
    assert seen[0] != seen[1] != seen[2]


def test_epochs_and_seeds_give_other_masks(tokenizer, sequences):
    labels = {}
    for seed in (0, 1, -1, 2**70 + 5):
        for epoch in (0, 1):
            collator = SeededCollator(MaskedLanguageModelingCollator(tokenizer, mlm_probability=0.5), seed)
            labels[seed, epoch] = collator(numbered(sequences, epoch))["labels"] != -100
    maskable = sum(len(s) - 2 for s in sequences)
    for a in labels:
        for b in labels:
            if a < b:  # independent fair coins: about half of the places differ
                assert 0.4 < (labels[a] ^ labels[b]).sum() / maskable < 0.6, (a, b)


def test_neighbours_and_duplicates_have_unrelated_masks(tokenizer):
    text = list(range(5, 105))
    collator = SeededCollator(MaskedLanguageModelingCollator(tokenizer, mlm_probability=0.5), 0)
    masks = collator(numbered([text] * 8))["labels"] != -100
    for i in range(8):
        for j in range(i):
            assert 25 < (masks[i] ^ masks[j]).sum() < 75, (i, j)


def test_by_itself_it_draws_as_the_stock_collator_does(tokenizer, sequences):
    """From torch's global generator: another mask each time, the same ones after the same seed."""
    collator = MaskedLanguageModelingCollator(tokenizer)
    torch.manual_seed(0)
    first, second = rows(collator(sequences)), rows(collator(sequences))
    torch.manual_seed(0)
    assert rows(collator(sequences)) == first != second
