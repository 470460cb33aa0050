"""A rendered conversation before it becomes tokens: its control tokens signed, its answers found."""

from collections.abc import Sequence
from typing import NamedTuple

from qlora_pipe.data.control import ControlTokens, Signed
from qlora_pipe.data.render import Answer, Rendered, Turn
from qlora_pipe.errors import DataError


class Stretch(NamedTuple):
    """An answer's characters in a signed rendering."""

    start: int
    said: int
    """Where what is said ends, and the tokens begin that end the turn."""
    end: int
    """Where those end."""


class Draft(NamedTuple):
    """A conversation as signed text."""

    text: str
    answers: list[Stretch]
    """Those to train on, in order; empty where none was asked for."""


def draft(rendered: Rendered, turns: Sequence[Turn], control: ControlTokens) -> Draft:
    """Tell the template's control tokens from the messages' text, and find where each answer's turn ends.

    DataError where the template makes that impossible for this conversation.
    """
    _check_contents(rendered, turns, control)
    spans = rendered.contents or []
    signed = control.sign(rendered.text, [(span.start, span.end) for span in spans])
    return Draft(signed.text, [_stretch(answer, rendered, turns, signed) for answer in rendered.answers])


def _check_contents(rendered: Rendered, turns: Sequence[Turn], control: ControlTokens) -> None:
    """Make sure that no text whose place is not known could be taken for a control token."""
    if rendered.contents is None:
        if any(control.may_join(turn.content) for turn in turns):
            raise DataError(
                "the template takes the text of a turn apart, and a turn holds what might be part of a control token"
            )
        return
    placed = {span.message for span in rendered.contents}
    if any(control.within(turn.content) for number, turn in enumerate(turns) if number not in placed):
        raise DataError("a turn that the template does not write out holds a control token's name")


def _stretch(answer: Answer, rendered: Rendered, turns: Sequence[Turn], signed: Signed) -> Stretch:
    said = answer.start
    if rendered.contents is not None and turns[answer.message].content.strip():
        inside = [span for span in rendered.contents if span.message == answer.message]
        if len(inside) != 1 or inside[0].start < answer.start or inside[0].end > answer.end:
            raise DataError("the template does not write out the answer once, where it belongs")
        said = inside[0].end
    closing = signed.closing(said, answer.end)
    if closing is None:
        raise DataError(
            "the template ends an answer without a control token of this tokenizer, so no model would learn to stop"
        )
    return Stretch(signed.place(answer.start), signed.place(closing[0]), signed.place(closing[1]))
