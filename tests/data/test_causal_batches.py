import torch

from hf_recycle.mlm.causal_batches import CausalCollator


def test_packed_sequences_are_stacked():
    batch = CausalCollator()([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["input_ids"].dtype == torch.int64


def test_padding_has_no_label_but_an_end_token_does():
    batch = CausalCollator(padding_id=9)([{"input_ids": [1, 9]}, {"input_ids": [4, 5, 6, 9]}])
    assert batch["input_ids"].tolist() == [[1, 9, 9, 9], [4, 5, 6, 9]]
    assert batch["labels"].tolist() == [[1, 9, -100, -100], [4, 5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
