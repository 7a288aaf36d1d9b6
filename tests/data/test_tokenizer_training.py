import pytest
from support.english import english
from transformers import AutoTokenizer

from hf_recycle.data import tokenizer as module
from hf_recycle.data.byte_bpe import byte_bpe_tokenizer
from hf_recycle.data.cache import cache_folder, cached_folder
from hf_recycle.data.tokenizer import corpus_key, load_tokenizer, trained_tokenizer
from hf_recycle.data.wordpiece import train_wordpiece
from hf_recycle.errors import UserError


@pytest.fixture(scope="module")
def texts():
    return english(4000)


def test_training_is_reproducible(texts):
    first = train_wordpiece(texts, 2000).to_str()
    assert all(train_wordpiece(texts, 2000).to_str() == first for _ in range(3))


def test_reads_and_writes_english(texts):
    tokenizer = trained_tokenizer(texts, 2000, max_seq_length=64)
    assert len(tokenizer) == 2000
    assert tokenizer.model_max_length == 64
    ids = tokenizer("The Function RETURNS a list")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the function returns a list"
    assert tokenizer.unk_token_id not in ids
    whole = ["[CLS]", "the", "function", "returns", "a", "list", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids) == whole


def test_special_tokens_are_special_and_pieces_are_not(texts):
    tokenizer = trained_tokenizer(texts, 2000, max_seq_length=64)
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3, 4}
    assert tokenizer.convert_tokens_to_ids("[MASK]") == tokenizer.mask_token_id
    # "##a" was named beforehand to order the vocabulary; in a text it is two hashes and a letter.
    assert tokenizer.tokenize("##a") == ["#", "#", "a"]


def test_a_saved_tokenizer_is_the_same_one(texts, tmp_path):
    tokenizer = trained_tokenizer(texts, 2000, max_seq_length=64)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == 2000
    assert again(texts[:20])["input_ids"] == tokenizer(texts[:20])["input_ids"]


def test_the_second_call_reads_the_cache(texts, monkeypatch):
    first = trained_tokenizer(texts, 1000, max_seq_length=64)

    def no_training(*_):
        raise AssertionError("trained again")

    monkeypatch.setitem(module._KINDS, "wordpiece", no_training)
    second = trained_tokenizer(texts, 1000, max_seq_length=32)
    assert second.get_vocab() == first.get_vocab()
    assert second.model_max_length == 32
    with pytest.raises(AssertionError, match="trained again"):
        trained_tokenizer(texts[1:], 1000, max_seq_length=64)


def test_the_key_is_the_content_the_size_and_the_kind():
    assert corpus_key(["ab", "c"], 1000) == corpus_key(iter(["ab", "c"]), 1000)
    keys = {corpus_key(["ab", "c"], 1000), corpus_key(["a", "bc"], 1000), corpus_key(["ab", "c"], 1001)}
    assert len(keys | {corpus_key(["ab", "c"], 1000, "byte_bpe")}) == 4


def test_byte_level_bpe_is_reproducible_and_loses_nothing(texts, tmp_path):
    first = byte_bpe_tokenizer(texts, 1000).backend_tokenizer.to_str()
    assert all(byte_bpe_tokenizer(texts, 1000).backend_tokenizer.to_str() == first for _ in range(2))
    trained_tokenizer(texts, 1000, 64, "byte_bpe").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 1000
    assert {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token} == {"<|endoftext|>", "<|pad|>"}
    text = "  The Function\treturns\n naïve 漢字 👾 ##a"
    ids = tokenizer(text)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("the function returns a list")["input_ids"]) < 9


def test_a_vocabulary_without_all_bytes_or_without_text(texts):
    with pytest.raises(UserError, match="tokenizer_vocab_size=257 is too small for all bytes"):
        byte_bpe_tokenizer(texts, 257)
    with pytest.raises(UserError, match="the corpus has no text"):
        byte_bpe_tokenizer(["", "  "], 1000)


def test_too_small_a_vocabulary(texts):
    with pytest.raises(UserError, match=r"tokenizer_vocab_size=64 is too small for the \d+ characters"):
        train_wordpiece(texts, 64)


def test_no_text_at_all():
    with pytest.raises(UserError, match="the corpus has no text"):
        train_wordpiece(["", "  "], 1000)


def test_an_unknown_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_name='.*nothing' could not be loaded") as caught:
        load_tokenizer(str(tmp_path / "nothing"), 64)
    assert "\n" not in str(caught.value)


def test_a_failed_fill_leaves_nothing():
    folder = cache_folder("things") / "one"

    def fail(temporary):
        (temporary / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(folder, fail)
    assert list(folder.parent.iterdir()) == []


def test_of_two_fills_at_once_the_first_one_wins():
    folder = cache_folder("things") / "one"

    def slow(temporary):
        cached_folder(folder, lambda other: (other / "who").write_text("fast"))
        (temporary / "who").write_text("slow")

    assert (cached_folder(folder, slow) / "who").read_text() == "fast"
    assert [entry.name for entry in folder.parent.iterdir()] == ["one"]
