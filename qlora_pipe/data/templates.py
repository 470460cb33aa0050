"""Which chat template a conversation is rendered with, and the rendering: a stranger's in a confined process."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pluggy

from qlora_formats.errors import FormatError
from qlora_formats.strict_json import read_object
from qlora_pipe.chat_template import ChatTemplate
from qlora_pipe.confined import Limits, run_confined
from qlora_pipe.data.render import MAX_SOURCE_BYTES, Answer, Rendered, Renderer, Span, TemplateRefusal, TrainOn, Turn
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError, DataError, MissingInputError
from qlora_pipe.plugins import RESERVED_TEMPLATES, chat_templates

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_FORM = "guanaco"

LIMITS = Limits(memory_bytes=512 * 2**20, cpu_seconds=8, wait_seconds=60, output_bytes=256 * 2**20)
# A process' share of the work, in turns that are rendered: large enough that its start, a tenth of a second, does not
# count, and a tenth of what its limit of time allows.
_MOST_TURNS = 60_000
_MOST_CHARACTERS = 8 * 2**20
_CHARACTERS_A_TURN = 4096
_TASK = "qlora_pipe.confined.rendering"


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A chat template that was chosen."""

    name: str
    """How errors call it: a registered template's name, or a file's path."""
    source: str
    installed: bool
    """Whether it came with a plugin: such a one is rendered in this process, and BOS is put in front of what it writes.
    All others are a stranger's, and their rendering is tokenised exactly as it is."""


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The templates there are for a model, and the one that was asked for."""

    chosen: Template | None
    """For every example; None leaves each its own form."""
    own: Template | None
    """The checkpoint's."""
    installed: Mapping[str, Template]
    variables: Mapping[str, str]
    """How control tokens are written: `eos_token` and such."""

    @classmethod
    def open(
        cls, folder: str | Path, tokenizer: Tokenizer, *, choice: str = "auto", manager: pluggy.PluginManager
    ) -> Self:
        """Find the templates for a model folder.

        `choice` is "auto", "checkpoint", a registered name, or a path that ends in .jinja. ConfigError where the
        folder's template or the choice is not usable, MissingInputError for a file that is not there.
        """
        # A template that is not asked for may be as broken as it likes.
        own = checkpoint_template(Path(folder)) if choice in RESERVED_TEMPLATES else None
        installed = {name: _installed(template) for name, template in chat_templates(manager).items()}
        chosen: Template | None = None
        if choice == "checkpoint":
            if own is None:
                raise ConfigError(f"{folder} has no chat template; choose another --template: {_listed(installed)}.")
            chosen = own
        elif choice.endswith(".jinja"):
            chosen = _template_file(Path(choice).expanduser())
        elif choice != "auto":
            if choice not in installed:
                raise ConfigError(
                    f"there is no chat template named {choice!r} (installed: {_listed(installed)}); name one of them, a"
                    " file that ends in .jinja, checkpoint, or auto."
                )
            chosen = installed[choice]
        return cls(chosen=chosen, own=own, installed=installed, variables=tokenizer.names)

    def find(self, form: str | None) -> Template:
        """Choose the template for an example of a form; DataError where there is none of that name."""
        if self.chosen is not None:
            return self.chosen
        if form is None:
            if self.own is not None:
                return self.own
            form = DEFAULT_FORM
        if form not in self.installed:
            raise DataError(f"its form is {form!r}, and no chat template has that name ({_listed(self.installed)})")
        return self.installed[form]

    @property
    def names_the_day(self) -> bool:
        """Whether one of the templates asks for today's date, and gets data/render.py's."""
        return any("strftime_now" in source for _, source in self.sources)

    @property
    def sources(self) -> list[tuple[str, str]]:
        """Texts of all templates that examples may be rendered with, in a fixed order, and names of the installed."""
        known = [self.chosen] if self.chosen is not None else [self.own, *self.installed.values()]
        return sorted((each.name if each.installed else "", each.source) for each in known if each is not None)

    def render(
        self, template: Template, conversations: Sequence[Sequence[Turn]], *, train_on: TrainOn
    ) -> Iterator[Rendered | str]:
        """Render conversations in order; a text in the place of one says why the template can't.

        DataError where the template is none, or takes more than it may.
        """
        if template.installed:
            yield from self._render_here(template, conversations, train_on=train_on)
            return
        for part in _parts(conversations):
            yield from self._render_confined(template, part, train_on=train_on)

    def _render_here(
        self, template: Template, conversations: Sequence[Sequence[Turn]], *, train_on: TrainOn
    ) -> Iterator[Rendered | str]:
        try:
            renderer = Renderer(template.source, self.variables)
        except TemplateRefusal as fault:
            raise DataError(f"the chat template {template.name} cannot be used: {fault}.") from fault
        for turns in conversations:
            try:
                yield renderer.conversation(turns, train_on=train_on)
            except TemplateRefusal as fault:
                yield str(fault)

    def _render_confined(
        self, template: Template, conversations: Sequence[Sequence[Turn]], *, train_on: TrainOn
    ) -> list[Rendered | str]:
        request = {
            "source": template.source,
            "variables": dict(self.variables),
            "conversations": conversations,
            "train_on": train_on,
        }
        what = f"the chat template {template.name} cannot be used"
        answer = bytearray()
        run_confined(_TASK, request, what=what, limits=LIMITS, write=answer.extend)
        try:
            found = [_checked(item, turns) for item, turns in zip(json.loads(answer), conversations, strict=True)]
        except (ValueError, TypeError, RecursionError) as fault:
            raise DataError(f"{what}: the process that renders it gave no rendering.") from fault
        return found


def checkpoint_template(folder: Path) -> Template | None:
    """Find a model folder's own template, where transformers looks for it; ConfigError where it is not usable."""
    if (folder / TEMPLATE_FILE).is_file():
        return _template_file(folder / TEMPLATE_FILE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = read_object(path).get("chat_template")
        except FormatError as fault:
            raise ConfigError(f"{fault}.") from fault
        if found is not None:
            return _stranger(_default_of(found, path), name=str(path))
    return None


def _default_of(found: object, path: Path) -> str:
    """The template that is meant where several have names."""
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        found = named["default"] if "default" in named else next(iter(named.values())) if len(named) == 1 else named
    if isinstance(found, dict):
        raise ConfigError(
            f"{path} has several chat templates ({', '.join(found)}) and none that is named default:"
            " give one to --template as a file that ends in .jinja."
        )
    if not isinstance(found, str):
        raise ConfigError(f"{path}: chat_template must be a text, or a list of objects with name and template.")
    return found


def _template_file(path: Path) -> Template:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SOURCE_BYTES + 1)
        return _stranger(data.decode(), name=str(path))
    except FileNotFoundError as fault:
        raise MissingInputError(f"there is no chat template at {path}.") from fault
    except OSError as fault:
        raise MissingInputError(f"{path} cannot be read: {fault.strerror}.") from fault
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path} is not UTF-8 text.") from fault


def _stranger(source: str, *, name: str) -> Template:
    if len(source.encode(errors="surrogatepass")) > MAX_SOURCE_BYTES:
        raise ConfigError(f"{name}: the chat template is longer than 64 KiB.")
    return Template(name=name, source=source, installed=False)


def _installed(template: ChatTemplate) -> Template:
    return Template(name=template.name, source=template.source, installed=True)


def _listed(installed: Mapping[str, Template]) -> str:
    return ", ".join(installed) or "none"


def _parts(conversations: Sequence[Sequence[Turn]]) -> Iterator[Sequence[Sequence[Turn]]]:
    first = work = room = 0
    for number, turns in enumerate(conversations):
        characters = sum(len(turn.content) for turn in turns)
        # Each answer is rendered with all that comes before it.
        turned = (len(turns) + characters // _CHARACTERS_A_TURN) * (1 + len(turns))
        if number > first and (work + turned > _MOST_TURNS or characters > room):
            yield conversations[first:number]
            first = number
        work, room = (0, _MOST_CHARACTERS) if number == first else (work, room)
        work, room = work + turned, room - characters
    if first < len(conversations):
        yield conversations[first:]


def _checked(item: Any, turns: Sequence[Turn]) -> Rendered | str:
    """Make a rendering of what the process answered; ValueError or TypeError where it is none."""
    if isinstance(item, str):
        return re.sub(r"[^ -~\w]", "?", item)
    text, contents, answers = item
    spans = None if contents is None else [Span(*_numbers(span, len(turns), len(text))) for span in contents]
    found = Rendered(str(text), spans, [Answer(*_numbers(span, len(turns), len(text))) for span in answers])
    places = [place for span in found.contents or () for place in (span.start, span.end)]
    if type(text) is not str or places != sorted(places):
        raise ValueError("spans overlap")
    return found


def _numbers(span: Any, n_turns: int, length: int) -> tuple[int, int, int]:
    message, start, end = span
    if not all(type(number) is int for number in span) or not (0 <= message < n_turns and 0 <= start <= end <= length):
        raise ValueError("a span lies outside")
    return message, start, end
