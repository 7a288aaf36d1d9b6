"""A tokenizer of whole words."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(size: int = 64, words: Sequence[str] | None = None, **options) -> PreTrainedTokenizerFast:
    """Of the special tokens and `words`, by default w0, w1, ...: `size` entries in all."""
    words = [*SPECIAL, *([f"w{i}" for i in range(size - len(SPECIAL))] if words is None else words)]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **options)
