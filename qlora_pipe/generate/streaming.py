"""The text of tokens as they come, shown no earlier than it is certain."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# Single bytes are among the first ids of every vocabulary that has them.
_SEARCHED_IDS = 2048
# A window of ids is decoded anew for each token: long enough to give the next its context, short enough to be cheap.
_WINDOW_IDS, _CONTEXT_IDS = 64, 16


class Detokenizer(Protocol):
    """What streaming asks of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Give the text of ids, special tokens dropped."""


def stream_text(tokenizer: Detokenizer, ids: Iterable[int], *, prompt: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of `ids`, which go on from `prompt`, in pieces that later ids cannot change.

    The pieces together are what decoding prompt and ids in one adds to the prompt's own text, so a first word keeps
    its leading space. Half characters are held back until they are whole, or certain to stay broken: where tokens are
    bytes, one wrong byte breaks the characters before it too. It asks of the tokenizer only that text which decodes
    to no broken character stays as it is when text is put behind it.
    """
    lone_byte = next((i for i in range(_SEARCHED_IDS) if tokenizer.decode([i]) == _REPLACEMENT), None)
    window = list(prompt)
    text = shown = tokenizer.decode(window)
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window)
        certain = text.rstrip(_REPLACEMENT)
        if lone_byte is not None:
            certain = certain[: _shared(certain, tokenizer.decode([*window, lone_byte]))]
        if not shown.startswith(certain):
            # Not all of `shown` stands before what is new only where a prompt ended within a character.
            yield certain[_shared(shown, certain) :]
            shown = certain
        if certain == text and len(window) > _WINDOW_IDS:
            context = tokenizer.decode(window[-_CONTEXT_IDS:])
            # A first space is dropped in decoding, so a context without text gives no context.
            if context:
                window, shown = window[-_CONTEXT_IDS:], context
                text = shown
    if not shown.startswith(text):
        yield text[_shared(shown, text) :]


def _shared(one: str, other: str) -> int:
    """Count the characters that two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
