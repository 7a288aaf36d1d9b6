"""Batches for causal language modelling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_recycle.mlm.loss import IGNORED


@dataclass(frozen=True)
class CausalCollator:
    """Sequences to `input_ids` and `labels` (the model shifts them), both `(batch, longest)`.

    Packed sequences need no padding, so no padding token either. Shorter ones are padded on the right with
    `padding_id`; the padding has no label and an attention mask leaves it out. An end-of-text token that is
    also the padding id keeps its label, which transformers' own collator would drop.
    """

    padding_id: int = 0

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the examples' `input_ids`."""
        rows = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        longest = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), longest), self.padding_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            labels[index, : len(row)] = row
        batch = {"input_ids": input_ids, "labels": labels}
        if any(len(row) < longest for row in rows):
            lengths = torch.tensor([len(row) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch
