"""What the collator makes of examples: padding, columns, shapes, and what makes no batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding, DataCollatorForLanguageModeling

from hf_recycle.mlm.masking import MaskedLanguageModelingCollator

SPECIAL_IDS = [0, 1, 2, 3, 4]
MASK, VOCABULARY = 4, 200
SHARES = {"mlm_probability": 0.15, "mask_replace_prob": 0.8, "random_replace_prob": 0.1}


def test_full_sequences_bring_no_attention_mask(tokenizer):
    collator = MaskedLanguageModelingCollator(tokenizer)
    full = [list(range(5, 21)), list(range(6, 22))]
    assert set(collator(full)) == {"input_ids", "labels"}
    assert set(collator([*full, [7]])) == {"input_ids", "labels", "attention_mask"}
    carried = [{"input_ids": s, "attention_mask": [1] * 16} for s in full]
    assert set(collator(carried)) == {"input_ids", "labels", "attention_mask"}


def test_padding_equals_the_stock_collator(make_tokenizer, sequences):
    for side in ("left", "right"):
        tokenizer = make_tokenizer(padding_side=side)
        examples = [
            {
                "input_ids": s,
                "token_type_ids": [i % 2 for i in range(len(s))],
                "special_tokens_mask": [1] * len(s),
            }
            for s in sequences
        ]  # nothing may be masked, so that only padding is compared
        ours = MaskedLanguageModelingCollator(tokenizer, pad_to_multiple_of=8)(examples)
        stock = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=8)(examples)
        assert set(ours) == set(stock)
        for name, column in ours.items():
            assert torch.equal(column, stock[name]), name
            assert column.dtype == torch.int64


def test_special_tokens_mask_decides(tokenizer):
    ids = list(range(2, 102))
    only = [i % 2 for i in range(100)]
    collator = MaskedLanguageModelingCollator(tokenizer, mlm_probability=1.0)
    batch = collator([{"input_ids": ids, "special_tokens_mask": only}])
    assert ((batch["labels"][0] == -100).long() == torch.tensor(only)).all()
    assert "special_tokens_mask" not in batch
    assert ((batch_labels := collator([ids])["labels"][0])[:3] == -100).all()
    assert (batch_labels[3:] != -100).all()


def test_the_tokenizers_own_special_tokens_are_not_masked(make_tokenizer):
    class Odd(type(make_tokenizer())):
        def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
            return [token % 2 for token in token_ids_0]

    backend = make_tokenizer()
    tokenizer = Odd(tokenizer_object=backend.backend_tokenizer, **backend.special_tokens_map)
    ids = list(range(5, 105))
    for collator in (
        MaskedLanguageModelingCollator(tokenizer, mlm_probability=1.0),
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0),
    ):
        labels = collator([{"input_ids": ids}])["labels"][0]
        assert [label != -100 for label in labels.tolist()] == [token % 2 == 0 for token in ids]


def test_every_kind_of_example_gives_the_same_batch(tokenizer, sequences):
    collator = MaskedLanguageModelingCollator(tokenizer)
    for group in (sequences, [s[:5] for s in sequences]):
        torch.manual_seed(0)
        reference = collator(group)
        kinds = [
            [tuple(s) for s in group],
            [np.array(s, dtype=np.int32) for s in group],
            [torch.tensor(s) for s in group],
            [{"input_ids": s} for s in group],
            [{"input_ids": np.array(s)} for s in group],
            [{"input_ids": torch.tensor(s), "labels": torch.tensor(s)} for s in group],
            [BatchEncoding({"input_ids": s}) for s in group],
        ]
        for examples in kinds:
            torch.manual_seed(0)
            batch = collator(examples)
            assert set(batch) == set(reference)
            assert all(torch.equal(batch[name], reference[name]) for name in batch)


def test_other_columns(tokenizer):
    examples = [
        {
            "input_ids": [5, 6, 7],
            "position_ids": [0, 1, 2],
            "weight": 0.5,
            "row": 3,
            "offset_mapping": [(0, 1)] * 3,
        },
        {
            "input_ids": [5, 6],
            "position_ids": [0, 1],
            "weight": 1.5,
            "row": 4,
            "offset_mapping": [(0, 1)] * 2,
        },
    ]
    batch = MaskedLanguageModelingCollator(tokenizer)(examples)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids", "weight", "row"}
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["weight"].tolist() == [0.5, 1.5]
    assert batch["row"].tolist() == [3, 4]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 1, 4, 8]),
    share=st.sampled_from([0.0, 0.15, 1.0]),
)
def test_shapes_of_ragged_batches(make_tokenizer, data, side, multiple, share):
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
    group = data.draw(st.lists(tokens, min_size=1, max_size=6))
    tokenizer = make_tokenizer(padding_side=side)
    collator = MaskedLanguageModelingCollator(tokenizer, mlm_probability=share, pad_to_multiple_of=multiple)
    batch = collator([{"input_ids": s} for s in group])
    longest = max(map(len, group))
    width = longest if multiple is None else (longest + multiple - 1) // multiple * multiple
    assert ("attention_mask" in batch) == any(len(s) < width for s in group)
    for name, column in batch.items():
        assert column.shape == (len(group), width), name
        assert column.dtype == torch.int64, name
    for i, s in enumerate(group):
        padding = [0] * (width - len(s))
        original = torch.where(batch["labels"][i] == -100, batch["input_ids"][i], batch["labels"][i]).tolist()
        assert original == (padding + s if side == "left" else s + padding)
        if share != 0.15:
            masked = [t >= 5 and share == 1.0 for t in original]
            assert (batch["labels"][i] != -100).tolist() == masked


# bad input


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([{"text": "x"}], "no input_ids"),
        ([{"input_ids": [[5, 6]]}], "input_ids"),
        ([{"input_ids": ["a", "b"]}], "input_ids"),
        ([{"input_ids": [0.5, 1.5]}], "whole numbers"),
        ([{"input_ids": [5], "x": 1}, {"input_ids": [5]}], "same columns"),
        ([{"input_ids": [5], "x": [1, 2]}, {"input_ids": [5], "x": [1]}], "'x'"),
        ([{"input_ids": [5], "text": "five"}], "'text'"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "'attention_mask'"),
    ],
)
def test_examples_that_make_no_batch(tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModelingCollator(tokenizer)(examples)


def test_padding_without_a_padding_token(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    collator = MaskedLanguageModelingCollator(tokenizer)
    assert collator([[5, 6], [7, 8]])["input_ids"].shape == (2, 2)
    with pytest.raises(ValueError, match="no padding token"):
        collator([[5, 6], [7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"mask_replace_prob": -0.1}, "mask_replace_prob=-0.1"),
        ({"random_replace_prob": 2}, "random_replace_prob=2"),
        ({"mask_replace_prob": 0.7, "random_replace_prob": 0.4}, "more than 1"),
    ],
)
def test_settings_out_of_range(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModelingCollator(tokenizer, **options)


def test_a_tokenizer_without_a_mask_token(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLanguageModelingCollator(tokenizer)
