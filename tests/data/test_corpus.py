import re
from collections import Counter

import pytest

from hf_recycle.data import corpus
from hf_recycle.data.corpus import builtin_corpus


@pytest.mark.slow
def test_the_same_at_every_call():
    assert builtin_corpus.__wrapped__() == builtin_corpus()


def test_enough_text_split_without_overlap():
    train, validation = builtin_corpus()
    assert sum(map(len, train)) > 1_000_000
    assert 0.03 < len(validation) / (len(train) + len(validation)) < 0.08
    everything = [paragraph.casefold() for paragraph in train + validation]
    assert len(set(everything)) == len(everything)


def test_reads_as_english():
    train, _ = builtin_corpus()
    words = Counter(re.findall(r"[a-z]+", " ".join(train).lower()))
    # Running English has about 6% "the"; code and tables have almost none.
    assert 0.03 < words["the"] / words.total() < 0.1
    assert words.most_common(1)[0][0] == "the"
    assert not any(">>>" in paragraph or "+---" in paragraph or "\n" in paragraph for paragraph in train)


def test_a_paragraph_keeps_its_side_whatever_surrounds_it(monkeypatch):
    train, validation = builtin_corpus()
    some = train[:50] + validation[:50]
    monkeypatch.setattr(corpus, "_documents", lambda: iter(["\n\n".join(some)]))
    assert builtin_corpus.__wrapped__() == (train[:50], validation[:50])


def test_without_documentation_says_what_to_do(monkeypatch):
    monkeypatch.setattr(corpus, "_documents", lambda: iter([]))
    with pytest.raises(RuntimeError, match="pass train_file or dataset_name"):
        builtin_corpus.__wrapped__()


@pytest.mark.parametrize(
    ("paragraph", "kept"),
    [
        ("Return the number of bytes that were read from the file.", True),
        (">>> the_answer = compute() and this is the rest of it", False),
        ("+-----------+ the table is in this one for all to see", False),
        ("spam eggs ham foo bar baz qux quux corge grault garply", False),
        ("x = 1; y[2] = (3, 4); z(5) += 6 & 7", False),
        ("Too short.", False),
    ],
)
def test_what_counts_as_prose(paragraph, kept):
    assert corpus._is_prose(paragraph) is kept
