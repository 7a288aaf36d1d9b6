"""What datasets keeps to itself (seen in datasets 5.2)."""

from typing import Any

from datasets import Dataset, IterableDataset

# The kinds of streams whose state says exactly where they are. A shuffle buffer is lost, and tables may skip rows.
EXACT = {
    "ArrowExamplesIterable",
    "CyclingMultiSourcesExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "RandomlyCyclingMultiSourcesExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "SkipExamplesIterable",
    "StepExamplesIterable",
    "TakeExamplesIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
}


def fingerprint(dataset: Dataset) -> str:
    """The name of a dataset's content: of its files, and of everything that was done to it since."""
    return dataset._fingerprint


def with_features(stream: IterableDataset) -> IterableDataset:
    """The stream with its columns and their types, if need be by reading its first examples."""
    return stream._resolve_features()


def is_split_by_node(dataset: Any) -> bool:
    """Whether `split_dataset_by_node` gave this process its part of a stream."""
    return getattr(dataset, "_distributed", None) is not None


def resumes_exactly(stream: IterableDataset) -> bool:
    """Whether a stream is exactly where it was when its `state_dict` is given back to it."""
    kind = stream._formatting
    return (kind is None or not kind.is_table) and _is_exact(stream._ex_iterable)


def _is_exact(iterable: Any) -> bool:
    inner = [*getattr(iterable, "ex_iterables", ()), *filter(None, [getattr(iterable, "ex_iterable", None)])]
    return type(iterable).__name__ in EXACT and all(map(_is_exact, inner))
