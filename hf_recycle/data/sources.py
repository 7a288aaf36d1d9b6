"""Where the texts come from: the Hub, local files or the built-in corpus."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value, load_dataset

from hf_recycle.data.arguments import DataArguments, is_tab_separated, text_builder
from hf_recycle.data.corpus import builtin_corpus
from hf_recycle.errors import UserError, reason_of
from hf_recycle.internals.of_datasets import with_features

# A WordPiece vocabulary gains nothing from more text than this.
_TOKENIZER_CHARACTERS = 100_000_000


@dataclass(frozen=True)
class Texts:
    """Documents not yet tokenised.

    `train` and `validation` have a column named `column`; `validation` is None when nothing names one.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    column: str
    name: str

    def sample(self, characters: int = _TOKENIZER_CHARACTERS) -> list[str]:
        """The first training documents, as many as it takes to have so many characters: for a tokenizer."""
        return list(_take(self.train, self.column, characters))


def load_texts(arguments: DataArguments) -> Texts:
    """Open the training and validation documents that `arguments` name.

    Raises:
        UserError: a dataset that cannot be loaded, without a training split or without a text column, or a
            file without text.
    """
    if arguments.dataset_name:
        train, validation = _hub_texts(arguments)
        name = arguments.dataset_name
    elif arguments.train_file:
        train = _file_texts(arguments.train_file, "train_file", arguments.streaming)
        validation = None
        name = Path(arguments.train_file).name
    else:
        train, validation = map(_in_memory, builtin_corpus())
        name = "built-in corpus"
    if arguments.validation_file:
        # Never streamed: every evaluation reads all of it.
        validation = _file_texts(arguments.validation_file, "validation_file", streaming=False)
    column = _text_column(train, arguments.text_column, name)
    if validation is not None:
        other = _text_column(validation, arguments.text_column, arguments.validation_file or name)
        if other != column:
            validation = validation.rename_column(other, column)
    return Texts(train, validation, column, name)


def _hub_texts(
    arguments: DataArguments,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    name = arguments.dataset_name
    try:
        splits = load_dataset(name, arguments.dataset_config_name, streaming=arguments.streaming)
    except Exception as error:  # the Hub, its client and each builder have their own
        raise UserError(
            f"dataset_name={name!r} could not be loaded ({reason_of(error)}); check its name, dataset_config_name="
            f"{arguments.dataset_config_name!r} and the network, or pass train_file"
        ) from error
    if not isinstance(splits, DatasetDict | IterableDatasetDict) or "train" not in splits:
        raise UserError(f"dataset_name={name!r} has no split named train, but {sorted(splits)}; name another dataset")
    return splits["train"], splits.get("validation")


def _file_texts(path: str, argument: str, streaming: bool) -> Dataset | IterableDataset:
    file, builder = str(Path(path).expanduser().resolve()), text_builder(path)
    # "NA" and "null" are words of a text, not missing values.
    options = {"sep": "\t" if is_tab_separated(path) else ",", "keep_default_na": False} if builder == "csv" else {}
    try:
        return load_dataset(builder, data_files={"train": [file]}, split="train", streaming=streaming, **options)
    except Exception as error:
        reason = reason_of(error.__cause__ or error)
        raise UserError(
            f"{argument}={path!r} could not be read as {builder} ({reason}); check that its content fits its extension"
        ) from error


def _in_memory(paragraphs: list[str]) -> Dataset:
    # Named after its content, so that what is computed from it is found again.
    name = hashlib.sha256("\0".join(paragraphs).encode()).hexdigest()[:32]
    return Dataset(pa.table({"text": paragraphs}), fingerprint=name)


def _text_column(dataset: Dataset | IterableDataset, wanted: str | None, name: str) -> str:
    features = dataset.features
    if features is None:  # a stream does not know its columns before it is read
        dataset = with_features(dataset)
        features = dataset.features or {}
    strings = [key for key, feature in features.items() if feature in (Value("string"), Value("large_string"))]
    if wanted is not None:
        if wanted not in strings:
            raise UserError(
                f"text_column={wanted!r} is not a column of strings of {name!r}, which has "
                f"{strings or sorted(features)}; name one of its text columns"
            )
        return wanted
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise UserError(f"{name!r} has no text column, only {sorted(features)}; use a dataset with text in it")
    raise UserError(f"{name!r} has several columns of strings, {strings}; pass text_column")


def _take(dataset: Dataset | IterableDataset, column: str, characters: int) -> Iterator[str]:
    left = characters
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        for text in itertools.chain(batch[column]):
            if text:
                yield text
                left -= len(text)
                if left <= 0:
                    return
