"""The built-in dataset `facts`: which value belongs to two keys, to be learned by heart.

The more neurons a small model has, the faster it learns them, so that what a method does to neurons shows within
seconds on a CPU. On text a model of that size does as well without any neuron.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerFast

from hf_recycle.data.arguments import DataArguments
from hf_recycle.mlm.loss import IGNORED
from hf_recycle.utils.seeds import generator_for

_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_SPECIAL |= {"mask_token": "[MASK]"}
_WORDS = tuple(_SPECIAL.values())
_CLS, _MASK = _WORDS.index("[CLS]"), _WORDS.index("[MASK]")


class Facts(Dataset):
    """Sequences `[CLS] key key [MASK]`, whose one label is the value that belongs to the two keys.

    Everything is a pure function of the numbers below. Each epoch of a task has all its facts, in another order; tasks
    come one after the other, with the same pairs of keys and new values.

    Args:
        keys: number of first keys, and of second ones. Were they the same, a model would first have to learn to tell
            their order, and some seeds take hundreds of steps to begin.
        values: number of values, each as likely.
        number: number of facts of a task; at most `keys`².
        tasks: tasks in a row.
        epochs: epochs of each task.
    """

    def __init__(self, keys: int, values: int, number: int, tasks: int = 1, epochs: int = 1):
        self.keys, self.values, self.number = keys, values, number
        self.tasks, self.epochs = tasks, epochs

    @classmethod
    def of(cls, arguments: DataArguments) -> "Facts":
        """The facts that validated arguments ask for."""
        keys = arguments.facts_keys
        number = arguments.facts_number or keys**2
        return cls(keys, arguments.facts_values, number, arguments.facts_tasks, arguments.facts_epochs)

    def __len__(self) -> int:
        return self.tasks * self.epochs * self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        samples = []
        for index in indices:
            epoch, place = divmod(index, self.number)
            fact = _permutation(self.number, epoch, "fact order")[place]
            first, second = divmod(_permutation(self.keys**2, 0, "fact keys")[fact], self.keys)
            value = _values(self.values, self.number, epoch // self.epochs)[fact]
            ids = [_CLS, len(_WORDS) + first, len(_WORDS) + self.keys + second, _MASK]
            labels = [IGNORED, IGNORED, IGNORED, len(_WORDS) + 2 * self.keys + value]
            samples.append({"input_ids": ids, "labels": labels})
        return samples

    def last_task(self) -> Subset:
        """The facts of the last task, once each: what a model is to know at the end of training."""
        return Subset(self, range(len(self) - self.number, len(self)))


@lru_cache(maxsize=128)
def _permutation(size: int, number: int, purpose: str) -> list[int]:
    return torch.randperm(size, generator=generator_for(0, number, 0, purpose)).tolist()


@lru_cache(maxsize=128)
def _values(values: int, number: int, task: int) -> list[int]:
    """The value of each fact of a task."""
    return torch.randint(values, (number,), generator=generator_for(0, task, 0, "fact values")).tolist()


def facts_tokenizer(keys: int, values: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each key (`k0`, `k1`, ...) and each value (`v0`, `v1`, ...)."""
    words = [*_WORDS, *(f"k{number}" for number in range(2 * keys)), *(f"v{number}" for number in range(values))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **_SPECIAL)
