"""Whole-word masking from texts to batches: where words begin, also in packed sequences, and what is masked."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_recycle.batches.numbered import Numbered
from hf_recycle.batches.seeded import SeededCollator
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.data.loading import load_data
from hf_recycle.data.tokenizer import trained_tokenizer
from hf_recycle.data.words import word_starts
from hf_recycle.errors import UserError
from hf_recycle.mlm.masking import MaskedLanguageModelingCollator
from hf_recycle.runs.run import prepare_data

WORDS = ["unbelievably", "the", "recycling", "of", "feed", "forward", "neurons", "continues", "magnitudes", "grow"]
LINES = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS))] * 20


def unigram(texts) -> PreTrainedTokenizerFast:
    """As sentencepiece has it: words begin with ▁."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_bpe(texts) -> PreTrainedTokenizerFast:
    tokenizer = trained_tokenizer(texts, 300, 64, "byte_bpe")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


TOKENIZERS = {"wordpiece": lambda texts: trained_tokenizer(texts, 256, 64), "byte_bpe": byte_bpe, "unigram": unigram}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param](LINES)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(LINES))
    return path


def marks_by_hand(tokenizer) -> list[int]:
    """Of all documents in a row: each word is tokenised alone, behind a space where it has one."""
    marks = []
    for line in LINES:
        for place, word in enumerate(line.split()):
            ids = tokenizer(f" {word}" if place else word, add_special_tokens=False)["input_ids"]
            marks += [1] + [0] * (len(ids) - 1)
        marks.append(1)  # what is between documents
    return marks


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by_line", [False, True])
def test_where_words_begin(tokenizer, text_file, streaming, by_line):
    common = {"train_file": str(text_file), "line_by_line": by_line, "streaming": streaming, "max_train_samples": 12}
    common |= {"validation_file": str(text_file), "max_seq_length": 24}
    plain = list(load_data(DataArguments(**common), tokenizer)[0])
    marked = list(load_data(DataArguments(**common, whole_word_mask=True), tokenizer)[0])
    assert [list(row["input_ids"]) for row in marked] == [list(row["input_ids"]) for row in plain]
    assert all(len(row["word_starts"]) == len(row["input_ids"]) for row in marked)
    framed = tokenizer.cls_token_id is not None
    bodies = [list(row["word_starts"])[framed : -framed or None] for row in marked]
    expected = marks_by_hand(tokenizer)
    for body in bodies:
        assert body == expected[: len(body)]
        if by_line:  # the next line
            expected = expected[1 + len(marks_of_a_line(expected)) :]
        else:
            expected = expected[len(body) :]
    if framed:
        assert all(row["word_starts"][0] == row["word_starts"][-1] == 1 for row in marked)


def marks_of_a_line(marks: list[int]) -> list[int]:
    """Those of as many words as a line has."""
    starts = [place for place, mark in enumerate(marks) if mark]
    return marks[: starts[len(WORDS)]]


def test_a_tokenizer_without_words_is_refused(text_file):
    backend = Tokenizer(models.BPE())
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=60, special_tokens=["[MASK]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]")
    with pytest.raises(UserError, match="whole_word_mask=True needs a tokenizer that tells where words begin"):
        load_data(DataArguments(train_file=str(text_file), whole_word_mask=True), tokenizer)


def test_a_task_without_masks_is_refused():
    with pytest.raises(UserError, match="whole_word_mask=True says what is masked, and task='clm' masks nothing"):
        prepare_data(ModelArguments(task="clm"), DataArguments(whole_word_mask=True))


def examples(n=400, length=40, seed=0) -> list[dict]:
    """Sequences between [CLS] and [SEP], of words of one to four tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        size = int(rng.integers(length // 2, length))
        ids = [2, *rng.integers(5, 200, size).tolist(), 3]
        starts = [1, *(rng.random(size) < 0.4).astype(int).tolist(), 1]
        rows.append({"input_ids": ids, "word_starts": starts})
    return rows


@pytest.fixture
def masked():
    """`masked(examples, side)`: rows of (starts, labels, inputs) without padding, and the labels' share."""
    tokenizer = trained_tokenizer(LINES, 256, 64)

    def collate(rows, side="right", **options):
        tokenizer.padding_side = side
        collator = MaskedLanguageModelingCollator(tokenizer, whole_word_mask=True, **options)
        numbered = [Numbered(0, number, row) for number, row in enumerate(rows)]
        batch = SeededCollator(collator, 5)(numbered)
        assert "word_starts" not in batch
        real = batch["attention_mask"].bool()
        return [
            (row["word_starts"], labels[mask].tolist(), inputs[mask].tolist())
            for row, labels, inputs, mask in zip(rows, batch["labels"], batch["input_ids"], real, strict=True)
        ]

    return collate


def test_all_tokens_of_a_word_or_none(masked):
    tokens = chosen = several = 0
    for starts, labels, _ in masked(examples()):
        body = list(zip(starts, labels, strict=True))[1:-1]
        assert labels[0] == labels[-1] == -100
        words: list[list[bool]] = []
        for place, (start, label) in enumerate(body):
            if start or place == 0:  # what continues a word of the sequence before is a word
                words.append([])
            words[-1].append(label != -100)
        assert all(len(set(word)) == 1 for word in words)
        several += sum(len(word) > 1 and word[0] for word in words)
        tokens, chosen = tokens + len(body), chosen + sum(map(sum, words))
    assert several > 100
    assert chosen / tokens == pytest.approx(0.15, abs=0.02)  # of tokens, not of words that any token was drawn in


def test_tokens_of_a_word_are_replaced_each_by_itself(masked):
    """Eight in ten become the mask token, one in ten another: never a whole word at once."""
    kept = [
        inputs[place] == label
        for _, labels, inputs in masked(examples())
        for place, label in enumerate(labels)
        if label != -100
    ]
    assert np.mean(kept) == pytest.approx(0.1, abs=0.03)


def test_masks_do_not_depend_on_the_padding(masked):
    rows = examples(30)
    assert masked(rows) == masked(rows, side="left") == masked(rows, pad_to_multiple_of=64)


def test_where_each_token_is_a_word_nothing_changes(masked):
    rows = [{**row, "word_starts": [1] * len(row["input_ids"])} for row in examples(30)]
    tokenizer = trained_tokenizer(LINES, 256, 64)
    plain = SeededCollator(MaskedLanguageModelingCollator(tokenizer), 5)
    batch = plain([Numbered(0, number, row) for number, row in enumerate(rows)])
    real = batch["attention_mask"].bool()
    labels = [row[mask].tolist() for row, mask in zip(batch["labels"], real, strict=True)]
    assert [label for _, label, _ in masked(rows)] == labels


def test_without_the_column_it_says_so(masked):
    with pytest.raises(ValueError, match="needs a column word_starts"):
        masked([{"input_ids": [2, 7, 3]}])


def test_word_starts_of_word_ids():
    assert word_starts([0, 0, 1, None, None, 2, 0]).tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert word_starts([]).tolist() == []
    assert torch.tensor(word_starts([3])).tolist() == [1]


def test_facts_say_themselves_what_is_masked():
    with pytest.raises(UserError, match="says what is masked, and the facts say so themselves"):
        prepare_data(ModelArguments(), DataArguments(dataset_name="facts", whole_word_mask=True))
