"""A tokenizer trained on the corpus, for models from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..processing_gavamoe import ITEM_TOKEN, USER_TOKEN

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 3000, phrases: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE tokenizer: any text can be encoded, whatever it was trained on.

    Args:
        texts (`Iterable[str]`): Text to train on: explanations of the training split, features and prompts.
        vocab_size (`int`, *optional*, defaults to 3000): Most tokens, the special ones and the 256 bytes included.
        phrases (`Sequence[str]`, *optional*): Texts that become one token each, besides: the unchanging parts of the
            prompt, which would otherwise be most of every sequence.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`] that pads on the left and has the placeholder tokens.

    Raises:
        `ValueError`: for a vocabulary that does not hold the bytes.
    """
    special_tokens = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, USER_TOKEN, ITEM_TOKEN]
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"Expected `vocab_size` of at least {smallest} (bytes and special tokens), got {vocab_size}.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[USER_TOKEN, ITEM_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer
