"""What a model is asked to go on from: a text as it is, or a conversation through its chat template."""

import string
from collections.abc import Sequence
from typing import NamedTuple

from qlora_pipe.data.control import ControlTokens
from qlora_pipe.data.draft import draft
from qlora_pipe.data.render import Turn
from qlora_pipe.data.templates import Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import DataError

# Stands for the answer that is to come; no template takes it for anything else.
_ANSWER = "A"
# An answer may begin with any of these, and a vocabulary may join it to a space before it.
_BEGINNINGS = string.ascii_letters + string.digits


class Prompt(NamedTuple):
    """Ids to go on from."""

    ids: list[int]
    stop_ids: frozenset[int]
    """Ids that end what comes, besides the model's own."""


def plain_prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    """Take a text as it is, after the tokenizer's BOS; DataError where it is none."""
    ids, _ = tokenizer.encode(text)
    return Prompt([*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *ids], frozenset([tokenizer.eos_id]))


def chat_prompt(turns: Sequence[Turn], *, templates: Templates, tokenizer: Tokenizer) -> Prompt:
    """Render what was said with the generation prompt; a turn ends with the template's end-of-turn token as well.

    The ids are those that would stand before an answer in a sample to train on: where the prompt ends with a space that
    the tokenizer puts into an answer's first token, they end before it. DataError where the template refuses the
    conversation.
    """
    template = templates.find(None)
    control = ControlTokens.of(tokenizer)
    asked, answered = templates.render(template, [turns, [*turns, Turn("assistant", _ANSWER)]], train_on="last")
    if isinstance(asked, str):
        raise DataError(f"the chat template {template.name} cannot be used: {asked}.")
    front = [tokenizer.bos_id] if template.installed and tokenizer.bos_id is not None else []
    stop_ids = {tokenizer.eos_id}
    (tokens,) = control.encode([draft(asked, turns, control).text])
    ids = tokens.ids.tolist()
    if not isinstance(answered, str):
        text, (answer,) = draft(answered, [*turns, Turn("assistant", _ANSWER)], control)
        whole, *begun = control.encode([text, *(text[: answer.start] + letter for letter in _BEGINNINGS)])
        ids = min((tokens.ids[tokens.ends <= answer.start].tolist() for tokens in begun), key=len)
        ends_turn = (whole.starts >= answer.said) & (whole.ends <= answer.end)
        stop_ids.add(int(whole.ids[ends_turn][0]))
    return Prompt(ids if front == ids[:1] else front + ids, frozenset(stop_ids))
