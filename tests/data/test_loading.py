import csv
import gzip
import io
import itertools
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from support.words import word_tokenizer

from hf_recycle.data import loading, sources
from hf_recycle.data.arguments import DataArguments
from hf_recycle.data.loading import load_data, tokenizer_key, unigram_entropy
from hf_recycle.data.sources import load_texts
from hf_recycle.errors import UserError
from hf_recycle.mlm.tasks import TASKS

LINES = [f"line {number} has the words one two three and {number % 7}" for number in range(200)]


@pytest.fixture
def tokenizer():
    """Whole words, with [CLS] and [SEP]."""
    words = ["line", "has", "the", "words", "one", "two", "three", "and"]
    return word_tokenizer(words=[*words, *(str(number) for number in range(200))])


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n\n".join(LINES) + "\n")
    return path


def words_of(sequences, tokenizer):
    """All ordinary words of the sequences in order."""
    special = set(tokenizer.all_special_ids)
    return [
        tokenizer.convert_ids_to_tokens(token)
        for row in sequences
        for token in row["input_ids"]
        if token not in special
    ]


ALL_WORDS = [word for line in LINES for word in line.split()]


def test_text_file_is_packed_full_and_loses_no_word(text_file, tokenizer):
    train, validation = load_data(DataArguments(train_file=str(text_file), max_seq_length=16), tokenizer)
    assert train.column_names == validation.column_names == ["input_ids"]
    assert {len(row["input_ids"]) for row in [*train, *validation]} == {16}
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in train)
    assert len(train) + len(validation) == 200 * 11 // 14
    assert len(validation) == round(0.05 * (200 * 11 // 14))
    assert set(words_of(train, tokenizer)) <= set(ALL_WORDS)


def test_packed_words_keep_their_order(text_file, tokenizer):
    arguments = DataArguments(train_file=str(text_file), validation_file=str(text_file), max_seq_length=16)
    train, validation = load_data(arguments, tokenizer)
    words = words_of(train, tokenizer)
    assert words == ALL_WORDS[: len(words)]
    assert len(words) > len(ALL_WORDS) - 16
    assert validation["input_ids"] == train["input_ids"]


def test_streaming_gives_the_same_sequences(text_file, tokenizer):
    whole = DataArguments(train_file=str(text_file), validation_file=str(text_file), max_seq_length=16)
    streamed = DataArguments(train_file=str(text_file), max_seq_length=16, streaming=True)
    train, _ = load_data(whole, tokenizer)
    stream, none = load_data(streamed, tokenizer)
    assert none is None
    assert [list(row["input_ids"]) for row in stream] == train["input_ids"][:]
    assert set(next(iter(stream))) == {"input_ids"}


def test_streaming_evaluates_on_a_named_file(text_file, tokenizer):
    arguments = DataArguments(
        train_file=str(text_file),
        validation_file=str(text_file),
        max_seq_length=16,
        streaming=True,
        max_train_samples=3,
    )
    train, validation = load_data(arguments, tokenizer)
    assert isinstance(validation, Dataset)
    assert len(list(train)) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_line_by_line(text_file, tokenizer, streaming):
    arguments = DataArguments(
        train_file=str(text_file),
        validation_file=str(text_file),
        max_seq_length=9,
        line_by_line=True,
        streaming=streaming,
    )
    train, _ = load_data(arguments, tokenizer)
    rows = [list(row["input_ids"]) for row in train]
    assert len(rows) == len(LINES)
    expected = [[2, *tokenizer.convert_tokens_to_ids(line.split())[:7], 3] for line in LINES]
    assert rows == expected


@pytest.mark.parametrize("as_lines", [True, False])
def test_json_files(tmp_path, text_file, tokenizer, as_lines):
    path = tmp_path / ("data.jsonl" if as_lines else "data.json")
    rows = [{"content": line, "number": index} for index, line in enumerate(LINES)]
    path.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    from_json, _ = load_data(DataArguments(train_file=str(path), max_seq_length=16), tokenizer)
    from_text, _ = load_data(DataArguments(train_file=str(text_file), max_seq_length=16), tokenizer)
    assert from_json["input_ids"][:] == from_text["input_ids"][:]


def write_table(path: Path, texts: list[str]) -> None:
    """Two columns of strings and one of numbers, by the ending of the path."""
    columns = {"title": ["a, b"] * len(texts), "body": texts, "number": list(range(len(texts)))}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return
    separator = "\t" if ".tsv" in path.suffixes else ","
    buffer = io.StringIO()
    rows = csv.writer(buffer, delimiter=separator)
    rows.writerow(columns)
    rows.writerows(zip(*columns.values(), strict=True))
    content = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.csv.gz", "data.parquet"])
def test_csv_and_parquet_files(tmp_path, text_file, tokenizer, name, streaming):
    """With quotes, separators and words that a reader of tables may take for missing values."""
    write_table(tmp_path / name, LINES)
    table = DataArguments(train_file=str(tmp_path / name), text_column="body", max_seq_length=16, streaming=streaming)
    rows = list(load_data(table, tokenizer)[0])
    text = DataArguments(train_file=str(text_file), max_seq_length=16, streaming=streaming)
    assert [list(row["input_ids"]) for row in rows] == [list(row["input_ids"]) for row in load_data(text, tokenizer)[0]]


def test_texts_of_a_table_are_read_as_they_are(tmp_path):
    texts = ["NA", 'a "quoted", text\nin two lines', "null", "nan", "", "1.50"]
    for name in ("data.csv", "data.parquet"):
        write_table(tmp_path / name, texts)
        read = load_texts(DataArguments(train_file=str(tmp_path / name), text_column="body"))
        assert read.train["body"][:] == texts


def test_a_table_without_its_text_column(tmp_path, tokenizer):
    write_table(tmp_path / "data.csv", LINES)
    refused(
        r"has several columns of strings, \['title', 'body'\]; pass text_column", train_file=str(tmp_path / "data.csv")
    )
    refused(
        "text_column='number' is not a column of strings", train_file=str(tmp_path / "data.csv"), text_column="number"
    )


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path, text_file, tokenizer, suffix, compress):
    path = tmp_path / f"data.txt{suffix}"
    path.write_bytes(compress(text_file.read_bytes()))
    packed, _ = load_data(DataArguments(train_file=str(path), max_seq_length=16), tokenizer)
    plain, _ = load_data(DataArguments(train_file=str(text_file), max_seq_length=16), tokenizer)
    assert packed["input_ids"][:] == plain["input_ids"][:]


def test_a_dataset_with_splits(tmp_path, monkeypatch, tokenizer):
    splits = DatasetDict(train=Dataset.from_dict({"text": LINES}), validation=Dataset.from_dict({"text": LINES[:40]}))
    asked = []
    monkeypatch.setattr(sources, "load_dataset", lambda *a, **k: asked.append((a, k)) or splits)
    arguments = DataArguments(dataset_name="who/what", dataset_config_name="en", max_seq_length=16)
    train, validation = load_data(arguments, tokenizer)
    assert asked == [(("who/what", "en"), {"streaming": False})]
    assert (len(train), len(validation)) == (200 * 11 // 14, 40 * 11 // 14)


def test_limits(text_file, tokenizer):
    arguments = DataArguments(train_file=str(text_file), max_seq_length=16, max_train_samples=5, max_eval_samples=2)
    train, validation = load_data(arguments, tokenizer)
    assert (len(train), len(validation)) == (5, 2)


def test_the_cut_off_part_is_always_the_same_and_spread(text_file, tokenizer):
    arguments = DataArguments(train_file=str(text_file), max_seq_length=16, validation_split_percentage=10)
    _, first = load_data(arguments, tokenizer)
    _, second = load_data(arguments, tokenizer)
    assert first["input_ids"][:] == second["input_ids"][:]
    assert len(first) == 16
    whole = DataArguments(train_file=str(text_file), validation_file=str(text_file), max_seq_length=16)
    everything = load_data(whole, tokenizer)[0]["input_ids"][:]
    places = [everything.index(row) for row in first["input_ids"][:]]
    assert max(b - a for a, b in itertools.pairwise(places)) <= 11


def test_a_second_run_tokenises_nothing(text_file, tokenizer, monkeypatch):
    arguments = DataArguments(train_file=str(text_file), max_seq_length=16)
    first, _ = load_data(arguments, tokenizer)
    # A call with truncation changes the state that the tokenizer's own hash is made of.
    tokenizer(LINES[:2], truncation=True, max_length=5, padding=True)

    def no_work(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(loading._Tokenise, "__call__", no_work)
    second, _ = load_data(arguments, tokenizer)
    assert second["input_ids"][:] == first["input_ids"][:]
    assert second.cache_files == first.cache_files


def test_what_changes_the_sequences_changes_their_key(text_file, tokenizer):
    def file_of(**changes):
        arguments = DataArguments(**({"train_file": str(text_file), "max_seq_length": 16} | changes))
        return load_data(arguments, tokenizer)[0].cache_files[0]["filename"]

    first = file_of()
    assert len({first, file_of(max_seq_length=17), file_of(line_by_line=True)}) == 3
    assert file_of(max_train_samples=3) == first
    text_file.write_text("\n".join(LINES[:100]))
    assert file_of() != first
    other = file_of()
    tokenizer.add_tokens(["unheard"])
    assert file_of() != other


def test_the_number_of_workers_does_not_change_the_sequences(text_file, tokenizer, private_caches, monkeypatch):
    one, _ = load_data(DataArguments(train_file=str(text_file), max_seq_length=16), tokenizer)
    monkeypatch.setenv("HF_RECYCLE_CACHE", str(private_caches / "other"))
    monkeypatch.setattr(loading, "_VERSION", 0)
    arguments = DataArguments(train_file=str(text_file), max_seq_length=16, preprocessing_num_workers=2)
    two, _ = load_data(arguments, tokenizer)
    assert two.cache_files != one.cache_files
    assert two["input_ids"][:] == one["input_ids"][:]


@pytest.mark.slow
def test_another_process_finds_what_this_one_tokenised(tmp_path, text_file):
    script = tmp_path / "load.py"
    script.write_text(
        "import sys\n"
        "from hf_recycle.data import corpus\n"
        "corpus._sources = lambda: iter(())\n"  # the help topics alone, which take a second and not ten
        "from hf_recycle.data.arguments import DataArguments\n"
        "from hf_recycle.data.loading import load_data\n"
        "from hf_recycle.data.sources import load_texts\n"
        "from hf_recycle.data.tokenizer import trained_tokenizer\n"
        "for arguments in (DataArguments(train_file=sys.argv[1], max_seq_length=16), DataArguments()):\n"
        "    texts = load_texts(arguments)\n"
        "    tokenizer = trained_tokenizer(texts.sample(), 1000, 16)\n"
        "    for part in load_data(arguments, tokenizer, texts):\n"
        "        print(part.cache_files[0]['filename'])\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    environment["HF_RECYCLE_CACHE"] = str(tmp_path / "cache")

    def files():
        command = [sys.executable, str(script), str(text_file)]
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path)
        return {path: path.stat().st_ino for path in Path(tmp_path / "cache").rglob("*") if path.is_file()}

    first = files()
    assert first
    assert files() == first


def test_the_key_of_a_tokenizer_ignores_its_calls(tokenizer):
    key = tokenizer_key(tokenizer)
    tokenizer(LINES[:2], truncation=True, max_length=5, padding="max_length")
    assert tokenizer_key(tokenizer) == key
    tokenizer.add_tokens(["unheard"])
    assert tokenizer_key(tokenizer) != key


def test_documents_of_a_tokenizer_without_cls_are_joined_by_its_end_token(text_file, tokenizer):
    tokenizer.cls_token = tokenizer.sep_token = None
    tokenizer.eos_token = "[MASK]"
    arguments = DataArguments(train_file=str(text_file), validation_file=str(text_file), max_seq_length=11)
    train, _ = load_data(arguments, tokenizer)
    # Each line has ten words: with its end token it is just one sequence.
    assert len(train) == len(LINES)
    assert all(row["input_ids"][-1] == 4 and row["input_ids"][0] == 5 for row in train)


def test_unigram_entropy_of_known_frequencies(tokenizer):
    def sequences(*rows):
        return Dataset.from_dict({"input_ids": [[2, *row, 3] for row in rows]})

    train = sequences(*[[5, 5, 5, 6]] * 1000)
    # 3,000 and 1,000 plus one each, over 4,000 and one for each ordinary token.
    ordinary = len(tokenizer) - 5
    expected = -(math.log(3001 / (4000 + ordinary)) + math.log(1001 / (4000 + ordinary))) / 2
    assert unigram_entropy(TASKS["mlm"], train, sequences([5, 6]), tokenizer) == pytest.approx(expected, rel=1e-12)
    # A token that training lacks costs more, and not infinitely much.
    unseen = unigram_entropy(TASKS["mlm"], train, sequences([7]), tokenizer)
    assert unseen == pytest.approx(math.log(4000 + ordinary), rel=1e-12)


def test_the_floor_of_a_causal_model_counts_all_but_the_first_token(tokenizer):
    """Special tokens are predicted like any other."""
    train = Dataset.from_dict({"input_ids": [[5, 6, 2], [6, 2]] * 500})
    validation = Dataset.from_dict({"input_ids": [[7, 6], [7, 2, 2]]})
    size = len(tokenizer)
    # 500 times 6 and 1,000 times 2 follow something, plus one each.
    expected = -(math.log(501 / (1500 + size)) + 2 * math.log(1001 / (1500 + size))) / 3
    assert unigram_entropy(TASKS["clm"], train, validation, tokenizer) == pytest.approx(expected, rel=1e-12)


def refused(message, **arguments):
    with pytest.raises(UserError, match=message) as caught:
        load_texts(DataArguments(**arguments))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    refused("train_file='.*gone.txt' does not exist", train_file=str(tmp_path / "gone.txt"))


def test_empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    refused("train_file='.*empty.txt' is empty", train_file=str(tmp_path / "empty.txt"))


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    refused("train_file='.*folder.txt' is not a file", train_file=str(tmp_path / "folder.txt"))


def test_unknown_extension(text_file, tmp_path):
    (tmp_path / "data.pdf").write_text("a,b\n1,2\n")
    refused(
        "validation_file='.*data.pdf' has an unknown extension; use one of .txt",
        train_file=str(text_file),
        validation_file=str(tmp_path / "data.pdf"),
    )


def test_broken_json(tmp_path):
    (tmp_path / "data.json").write_text('{"text": "cut off')
    refused("train_file='.*data.json' could not be read as json", train_file=str(tmp_path / "data.json"))


def test_file_of_blank_lines(tmp_path, tokenizer):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(UserError, match=r"blank\.txt gives not one sequence of max_seq_length=16 tokens"):
        load_data(DataArguments(train_file=str(tmp_path / "blank.txt"), max_seq_length=16), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_tokens_than_one_sequence(tmp_path, tokenizer, streaming):
    (tmp_path / "short.txt").write_text("one two three\n")
    arguments = DataArguments(train_file=str(tmp_path / "short.txt"), max_seq_length=16, streaming=streaming)
    with pytest.raises(UserError, match="pass more text, a smaller max_seq_length or line_by_line"):
        load_data(arguments, tokenizer)


def test_one_sequence_leaves_none_to_evaluate_on(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text(LINES[0] + "\n" + LINES[1] + "\n")
    with pytest.raises(UserError, match="leaves none to evaluate on; pass more text or a validation_file"):
        load_data(DataArguments(train_file=str(tmp_path / "short.txt"), max_seq_length=16), tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1]}, r"'who/what' has no text column, only \['label'\]"),
        ({"a": ["x"], "b": ["y"]}, r"several columns of strings, \['a', 'b'\]; pass text_column"),
    ],
)
def test_no_text_column(monkeypatch, columns, message):
    monkeypatch.setattr(sources, "load_dataset", lambda *a, **k: DatasetDict(train=Dataset.from_dict(columns)))
    refused(message, dataset_name="who/what")


def test_the_text_column_can_be_named(monkeypatch):
    splits = DatasetDict(train=Dataset.from_dict({"a": ["x"], "b": ["y"], "c": [1]}))
    monkeypatch.setattr(sources, "load_dataset", lambda *a, **k: splits)
    assert load_texts(DataArguments(dataset_name="who/what", text_column="b")).sample() == ["y"]
    refused("text_column='c' is not a column of strings", dataset_name="who/what", text_column="c")


def test_a_dataset_without_training_split(monkeypatch):
    splits = DatasetDict(test=Dataset.from_dict({"text": ["x"]}))
    monkeypatch.setattr(sources, "load_dataset", lambda *a, **k: splits)
    refused(r"no split named train, but \['test'\]", dataset_name="who/what")


def test_a_dataset_that_does_not_load(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to the Hub.\nmore lines")

    monkeypatch.setattr(sources, "load_dataset", fail)
    refused(r"dataset_name='who/what' could not be loaded \(no route to the Hub\)", dataset_name="who/what")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "a", "train_file": "b.txt"}, "both name training data"),
        ({"validation_file": "b.txt"}, "needs training data beside it"),
        ({"streaming": True}, "needs something to stream"),
        ({"max_seq_length": 2}, "max_seq_length=2 is too short"),
        ({"mlm_probability": 0.0}, "mlm_probability=0.0 must lie between 0 and 1"),
        ({"mlm_probability": 15}, "mlm_probability=15 must lie between 0 and 1"),
        ({"validation_split_percentage": 0}, "validation_split_percentage=0 must lie between 1 and 50"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"preprocessing_num_workers": -1}, "preprocessing_num_workers=-1 must be at least 1"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    refused(message, **arguments)


def test_sample_stops_when_it_has_enough(text_file):
    texts = load_texts(DataArguments(train_file=str(text_file)))
    assert texts.sample(characters=100) == LINES[:3]
    assert texts.sample() == LINES
