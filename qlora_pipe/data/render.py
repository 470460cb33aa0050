"""Render conversations with a Jinja template, as transformers does, and say which characters are whose.

A template is a stranger's program. The sandbox keeps it from everything but what it is given; time, memory and output
are limited by the process that this runs in (qlora_pipe/confined/rendering.py). This module imports no torch.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, NoReturn

import jinja2
import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TrainOn = Literal["answers", "all", "last"]

MAX_SOURCE_BYTES = 64 * 1024
MAX_TEXT = 4 * 2**20
"""Most characters of one rendered conversation."""

FROZEN_NOW = datetime(2024, 7, 26)
"""What `strftime_now` gives every day, so that the same rows are the same samples tomorrow. Llama 3.1's and 3.2's own
templates name this date where they are not told another."""

MARKS = range(0x10E000, 0x10F000)
"""Private-use characters that no message may hold: the first closes a marked stretch, each other opens a message's."""

_MARK = re.compile("[\U0010e000-\U0010efff]")
_LONGEST_REASON = 200


class TemplateRefusal(Exception):
    """A conversation that the template refuses, or whose mask it hides; the message completes a sentence."""


class Turn(NamedTuple):
    """What a template sees of a message."""

    role: str
    content: str


class Span(NamedTuple):
    """Half-open range of characters of a rendering that a message's text came to, without the space around it."""

    message: int
    start: int
    end: int


class Answer(NamedTuple):
    """An answer to train on: what the rendering gains after the prompt that asks for it, half-open, in characters."""

    message: int
    start: int
    end: int


class Rendered(NamedTuple):
    """A conversation as the template writes it."""

    text: str
    contents: list[Span] | None
    """In order; None where the template takes messages apart, so that nobody can tell what came of them."""
    answers: list[Answer]
    """Empty where nothing, or everything, is to be trained."""


class Renderer:
    """A compiled template with the variables that it is given."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Compile it; TemplateRefusal where it is no template."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as fault:
            raise TemplateRefusal(f"line {fault.lineno}: {_one_line(fault.message)}") from fault
        except (SyntaxError, RecursionError) as fault:
            raise TemplateRefusal(f"it is nested too deeply ({type(fault).__name__})") from fault
        except (ValueError, ArithmeticError, LookupError, TypeError) as fault:
            # Jinja reads numbers and computes with constants while it compiles.
            raise TemplateRefusal(f"it cannot be compiled ({type(fault).__name__}: {_one_line(fault)})") from fault
        self._variables = dict(variables)

    def conversation(self, turns: Sequence[Turn], *, train_on: TrainOn) -> Rendered:
        """Render a conversation and find its answers; one that ends with another's turn is rendered as a prompt.

        Each answer's place follows from rendering what leads up to it with the generation prompt, and what comes after
        it without: both must begin the whole rendering, or TemplateRefusal is raised.
        """
        asks = not turns or turns[-1].role != "assistant"
        text = self.text(turns, add_generation_prompt=asks)
        answers = [] if asks or train_on == "all" else self._answers(turns, text, only_last=train_on == "last")
        return Rendered(text, self._contents(turns, text, add_generation_prompt=asks), answers)

    def text(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        """Render without looking further; TemplateRefusal says what the template objects to."""
        pieces: list[str] = []
        room = MAX_TEXT
        try:
            for piece in self._template.generate(
                messages=[turn._asdict() for turn in turns],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                room -= len(piece)
                if room < 0:
                    raise TemplateRefusal(f"the template writes more than {MAX_TEXT:,} characters")
                pieces.append(piece)
        except (TemplateRefusal, MemoryError):
            raise
        except _Raised as fault:
            raise TemplateRefusal(f"the template refuses the conversation: {_one_line(fault)}") from fault
        except Exception as fault:
            # A stranger's program can raise anything, and what it does to one row is that row's fault.
            raise TemplateRefusal(
                f"the template fails on the conversation: {type(fault).__name__}: {_one_line(fault)}"
            ) from fault
        return "".join(pieces)

    def _answers(self, turns: Sequence[Turn], text: str, *, only_last: bool) -> list[Answer]:
        wanted = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        found: list[Answer] = []
        for number in wanted[-1:] if only_last else wanted:
            prompt = self.text(turns[:number], add_generation_prompt=True)
            until = text if number == len(turns) - 1 else self.text(turns[: number + 1], add_generation_prompt=False)
            if not text.startswith(prompt):
                raise TemplateRefusal(
                    f"the template writes what leads to answer {len(found) + 1} otherwise once the answer is there,"
                    " so what is trained could not be told exactly"
                )
            if not text.startswith(until) or len(until) <= len(prompt):
                raise TemplateRefusal(
                    f"the template writes answer {len(found) + 1} otherwise once more has been said, so what is trained"
                    " could not be told exactly; --train-on last trains the last answer alone"
                )
            found.append(Answer(number, len(prompt), len(until)))
        return found

    def _contents(self, turns: Sequence[Turn], text: str, *, add_generation_prompt: bool) -> list[Span] | None:
        """Find what came of each message by rendering once more, with marks around each text that survive in place."""
        if len(turns) >= len(MARKS):
            raise TemplateRefusal(f"it has {len(turns):,} turns, and {len(MARKS) - 1:,} can be told apart")
        marked = self.text(
            [_marked(number, turn) for number, turn in enumerate(turns)], add_generation_prompt=add_generation_prompt
        )
        if _MARK.sub("", marked) != text:
            return None
        spans: list[Span] = []
        opened: Span | None = None
        for before, found in enumerate(_MARK.finditer(marked)):
            mark, place = ord(found[0]) - MARKS.start, found.start() - before
            if (mark == 0) == (opened is None):
                return None
            if opened is None:
                opened = Span(mark - 1, place, place)
            else:
                spans.append(opened._replace(end=place))
                opened = None
        return spans if opened is None else None


class _Raised(Exception):
    """What a template says through `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}`: marks what an assistant says, for other programs; what it holds is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` for templates: it can be called, and has nothing to climb out by."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        for name in dict(*args[1:], **named):
            _check_name(name)
        Namespace.__init__(*args, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace keeps no name that begins with an underscore: {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up, but for the date and for chance, of which no data may be made."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.filters["random"] = _drawn
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = FROZEN_NOW.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _drawn(choices: Iterable[Any]) -> Any:
    return random.Random(0).choice(list(choices))


def _raise(message: object) -> NoReturn:
    raise _Raised(message)


def _marked(number: int, turn: Turn) -> Turn:
    """Put marks around a text's core: what a template trims off must not take them along."""
    core = turn.content.strip()
    if not core:
        return turn
    before = turn.content[: len(turn.content) - len(turn.content.lstrip())]
    after = turn.content[len(before) + len(core) :]
    return turn._replace(content=f"{before}{chr(MARKS[number + 1])}{core}{chr(MARKS[0])}{after}")


def _one_line(fault: object) -> str:
    said = " ".join(str(fault).split())
    return said if len(said) <= _LONGEST_REASON else f"{said[: _LONGEST_REASON - 3]}..."
