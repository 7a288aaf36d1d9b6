"""A byte-level BPE tokenizer trained on texts, as GPT-2 has one."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_recycle.errors import UserError

_END, _PAD = "<|endoftext|>", "<|pad|>"


def byte_bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `texts`: every text is a sequence of its tokens, and comes back unchanged.

    Documents end with `<|endoftext|>`. Padding is a token of its own, because models such as Llama never train the
    embedding of their padding token.

    Raises:
        UserError: there is no text, or `vocab_size` is too small for all bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [_END, _PAD]
    if vocab_size < len(alphabet) + len(special):
        raise UserError(
            f"tokenizer_vocab_size={vocab_size} is too small for all bytes and the special tokens, "
            f"{len(alphabet) + len(special)} entries; pass a larger one"
        )
    if not any(text and not text.isspace() for text in texts):
        raise UserError(f"a vocabulary of tokenizer_vocab_size={vocab_size} cannot be trained: the corpus has no text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_END,
        eos_token=_END,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )
