"""The tokenizer: a named one, the checkpoint's own, or one trained on the corpus."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_recycle.data.byte_bpe import byte_bpe_tokenizer
from hf_recycle.data.cache import cache_folder, cached_folder
from hf_recycle.data.wordpiece import wordpiece_tokenizer
from hf_recycle.errors import UserError, reason_of

# Raise it when a kind's training changes, so that old cached tokenizers are not taken for new ones.
_VERSION = 1
_KINDS = {"wordpiece": wordpiece_tokenizer, "byte_bpe": byte_bpe_tokenizer}


def load_tokenizer(
    name_or_path: str, max_seq_length: int, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer of the Hub or of a local folder, set to `max_seq_length`.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, use_fast=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer_name={name_or_path!r} could not be loaded ({loading_problem(error)}); name a tokenizer of the "
            "Hub or a local folder, or name none to have one trained on the corpus"
        ) from error
    # Texts are packed to full sequences, so a longer text is no reason for a warning.
    tokenizer.model_max_length = max_seq_length
    return tokenizer


def trained_tokenizer(
    texts: Sequence[str], vocab_size: int, max_seq_length: int, kind: str = "wordpiece"
) -> PreTrainedTokenizerBase:
    """A tokenizer of `texts`, trained once and kept in the cache.

    The same texts and size give the same vocabulary on every machine. A small corpus may give fewer entries
    than `vocab_size`.

    Args:
        kind: "wordpiece", lower-case, or "byte_bpe".

    Raises:
        UserError: there is no text, or `vocab_size` is too small to hold the alphabet.
    """
    folder = cache_folder("tokenizers") / corpus_key(texts, vocab_size, kind)

    def fill(temporary: Path) -> None:
        _KINDS[kind](texts, vocab_size).save_pretrained(temporary)

    return load_tokenizer(str(cached_folder(folder, fill)), max_seq_length)


def corpus_key(texts: Iterable[str], vocab_size: int, kind: str = "wordpiece") -> str:
    """Names a trained tokenizer: a hash of the texts' content, of the size of the vocabulary and of its kind."""
    digest = hashlib.sha256(f"{kind} {_VERSION} {vocab_size}".encode())
    for text in texts:
        digest.update(b"\0")
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def loading_problem(error: BaseException) -> str:
    """Why transformers could not load something, in a clause."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is run only with --trust_remote_code true"
    return reason_of(error)
