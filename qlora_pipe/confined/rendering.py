"""Confined work: render conversations with a stranger's template, and answer with one JSON list.

Of each conversation it holds the rendering (data/render.py), or, as a text, why there is none.
"""

import json
from contextlib import suppress
from typing import Any, BinaryIO

from qlora_pipe.confined.ending import Refused
from qlora_pipe.confined.worker import Work, Write
from qlora_pipe.data.render import Renderer, TemplateRefusal, Turn

_HARMLESS = """
{%- macro said(message) -%}{{ '\\n\u00e9' ~ 1.5 ~ message.content|trim|tojson|pprint|urlencode }}{%- endmacro -%}
{%- for message in messages -%}{%- generation -%}{{ said(message) }}{%- endgeneration -%}{%- endfor -%}
{{ strftime_now('%d %B %Y') }}{{ raise_exception('loads what an error needs') }}
"""


def prepare(request: dict[str, Any], file: BinaryIO | None) -> Work:  # noqa: ARG001
    """Render once what is harmless, so that all that Jinja loads late is there; the work itself opens nothing."""
    with suppress(TemplateRefusal):
        Renderer(_HARMLESS, {}).text([Turn("user", "")], add_generation_prompt=False)
    return lambda write: _render(request, write)


def _render(request: dict[str, Any], write: Write) -> None:
    try:
        renderer = Renderer(request["source"], request["variables"])
    except TemplateRefusal as fault:
        raise Refused(str(fault)) from fault
    separator = b"["
    for turns in request["conversations"]:
        write(separator + json.dumps(_rendered(renderer, turns, request)).encode())
        separator = b","
    write(b"[]" if separator == b"[" else b"]")


def _rendered(renderer: Renderer, turns: list[list[str]], request: dict[str, Any]) -> object:
    try:
        return renderer.conversation([Turn(*turn) for turn in turns], train_on=request["train_on"])
    except TemplateRefusal as fault:
        return str(fault)
