"""The demo's tokenizer: byte-level BPE learned from the corpus, so that each of its words is one token."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2


def learn_tokenizer(texts: Iterable[str], *, size: int) -> Tokenizer:
    """Learn a vocabulary of `size` tokens: three control tokens, all 256 bytes, and pieces of the texts.

    A word and the space before it are one piece, any text can be encoded, and BOS is put in front of it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[UNKNOWN, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer
