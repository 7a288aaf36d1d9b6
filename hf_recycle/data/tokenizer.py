"""The tokenizer: a named one, the checkpoint's own, or a WordPiece trained on the corpus."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from hf_recycle.data.cache import cache_folder, cached_folder
from hf_recycle.errors import UserError

# Raise it when the training below changes, so that old cached tokenizers are not taken for new ones.
_VERSION = 1
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
            f"tokenizer_name={name_or_path!r} could not be loaded ({_first_line(error)}); name a "
            "tokenizer of the "
            "Hub or a local folder, or name none to have one trained on the corpus"
        ) from error
    # Texts are packed to full sequences, so a longer text is no reason for a warning.
    tokenizer.model_max_length = max_seq_length
    return tokenizer


def trained_tokenizer(texts: Sequence[str], vocab_size: int, max_seq_length: int) -> PreTrainedTokenizerBase:
    """A lower-case WordPiece tokenizer of `texts`, trained once and kept in the cache.

    The same texts and size give the same vocabulary on every machine. A small corpus may give fewer entries
    than `vocab_size`.

    Raises:
        UserError: there is no text, or `vocab_size` is too small to hold the alphabet.
    """
    folder = cache_folder("tokenizers") / corpus_key(texts, vocab_size)

    def fill(temporary: Path) -> None:
        roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        names: dict[str, Any] = dict(zip(roles, _SPECIAL_TOKENS, strict=True))
        tokenizer = BertTokenizer(
            tokenizer_object=train_wordpiece(texts, vocab_size),
            **names,
        )
        tokenizer.save_pretrained(temporary)

    return load_tokenizer(str(cached_folder(folder, fill)), max_seq_length)


def corpus_key(texts: Iterable[str], vocab_size: int) -> str:
    """Names a trained tokenizer: a hash of the texts' content and of the size of the vocabulary."""
    digest = hashlib.sha256(f"wordpiece {_VERSION} {vocab_size}".encode())
    for text in texts:
        digest.update(b"\0")
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train WordPiece with BERT's normaliser and special tokens, the same at every call.

    The trainer of `tokenizers` numbers the pieces that continue a word ("##a") in the order of a hash map,
    which differs from run to run, and breaks ties between merges by these numbers. Naming them in order
    beforehand makes its result reproducible. That is done through its special tokens, so the vocabulary is then
    taken over into a tokenizer where they are ordinary ones.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    alphabet = _alphabet((normalizer.normalize_str(text) for text in texts), limit=vocab_size // 16)
    if not alphabet:
        raise UserError(f"a vocabulary of tokenizer_vocab_size={vocab_size} cannot be trained: the corpus has no text")
    pieces = [f"##{character}" for character in alphabet]
    if len(_SPECIAL_TOKENS) + len(alphabet) + len(pieces) >= vocab_size:
        raise UserError(
            f"tokenizer_vocab_size={vocab_size} is too small for the {len(alphabet)} characters "
            "of the corpus, "
            f"which take {len(_SPECIAL_TOKENS) + 2 * len(alphabet)} entries; pass a larger one"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL_TOKENS, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = _wordpiece({token: index for index, token in enumerate(_SPECIAL_TOKENS)}, normalizer)
    learner.train_from_iterator(texts, trainer)

    tokenizer = _wordpiece(learner.get_vocab(with_added_tokens=True), normalizer)
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _wordpiece(vocab: dict[str, int], normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _alphabet(texts: Iterable[str], limit: int) -> list[str]:
    """The `limit` most frequent characters, at least 64 of them, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(frequent[: max(limit, 64)])


def _first_line(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is run only with --trust_remote_code true"
    return str(error).strip().split("\n", 1)[0].rstrip(". ") or type(error).__name__
