"""Where words begin among tokens, by the tokenizer's own account of them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from hf_recycle.errors import UserError


def word_starts(word_ids: Sequence[int | None]) -> npt.NDArray[np.int8]:
    """1 where a token belongs to another word than the one before it, else 0: int8 `(tokens,)`.

    Args:
        word_ids: as an encoding of `tokenizers` has them; None for a token of no word.
    """
    ids = np.array([-1 if word is None else word for word in word_ids], np.int64)
    return (np.diff(ids, prepend=-1) != 0).astype(np.int8)


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not tell words apart.

    Raises:
        UserError: it says nothing of words, or cuts no text into them.
    """
    text = "some words of a sentence"
    encoded = tokenizer(text, add_special_tokens=False) if tokenizer.is_fast else None
    if encoded is None or len(set(encoded.word_ids())) < len(text.split()):
        raise UserError(
            f"whole_word_mask=True needs a tokenizer that tells where words begin, which {tokenizer.name_or_path!r} "
            "does not; name another tokenizer, or leave it out"
        )
