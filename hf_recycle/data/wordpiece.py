"""A WordPiece tokenizer trained on texts, with BERT's normaliser and special tokens."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase

from hf_recycle.errors import UserError

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A lower-case WordPiece tokenizer of `texts`.

    Raises:
        UserError: see `train_wordpiece`.
    """
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    names: dict[str, Any] = dict(zip(roles, _SPECIAL_TOKENS, strict=True))
    return BertTokenizer(tokenizer_object=train_wordpiece(texts, vocab_size), **names)


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
            f"tokenizer_vocab_size={vocab_size} is too small for the {len(alphabet)} characters of the corpus, "
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
