"""A tiny tokenizer and sequences of words."""

import functools

import numpy as np
import pytest
from support.words import word_tokenizer

SIZE = 200


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer(SIZE)


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(**options)`"""
    return functools.partial(word_tokenizer, SIZE)


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """64 sequences of 5 to 30 tokens, between [CLS] and [SEP]."""
    rng = np.random.default_rng(0)
    return [[2, *rng.integers(5, SIZE, rng.integers(3, 29)).tolist(), 3] for _ in range(64)]
