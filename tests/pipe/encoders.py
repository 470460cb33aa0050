"""Encoders for tests: a tokenizer of bytes with control tokens of one's own, and templates without a folder."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from qlora_pipe.data.encode import Encoder, Sample
from qlora_pipe.data.templates import Template, Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Example, Message, Role
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import chat_templates, load_plugins
from qlora_pipe.testing import byte_tokenizer


def byte_folder(folder: Path, *, special: tuple[str, ...] = (), **config: Any) -> Path:
    """Write the tokenizer of 256 bytes with more control tokens; `config` goes to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = byte_tokenizer()
    raw.add_special_tokens(list(special))
    (folder / "tokenizer.json").write_text(raw.to_str())
    said = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@cache
def installed_templates() -> dict[str, Template]:
    """The templates that plugins bring."""
    found = chat_templates(load_plugins())
    return {name: Template(name=name, source=each.source, installed=True) for name, each in found.items()}


@cache
def encoder_of(tokenizer: Tokenizer, *, own: str | None = None, max_tokens: int = 10_000, **settings: Any) -> Encoder:
    """Make an encoder; `own` is the checkpoint's template."""
    template = None if own is None else Template(name="own.jinja", source=own, installed=False)
    templates = Templates(chosen=None, own=template, installed=installed_templates(), variables=tokenizer.names)
    return Encoder(tokenizer=tokenizer, max_tokens=max_tokens, templates=templates, **settings)


def chat(*turns: tuple[Role, str], form: str | None = None) -> Example:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Example(messages=messages, origin="rows.jsonl:7", form=form)


def samples_of(example: Example, encoder: Encoder) -> list[Sample]:
    """Encode one example; what is wrong with it is raised."""
    (found,) = encoder.encode([example])
    if isinstance(found, DataError):
        raise found
    return found


def sample_of(example: Example, encoder: Encoder) -> Sample:
    (sample,) = samples_of(example, encoder)
    return sample


def text_of(sample: Sample, encoder: Encoder) -> str:
    """The whole sequence as text, control tokens written out."""
    return encoder.tokenizer.inner.decode(sample.ids.tolist(), skip_special_tokens=False)


def targets_of(sample: Sample, encoder: Encoder) -> str:
    """What is trained as text, control tokens written out."""
    return encoder.tokenizer.inner.decode(sample.ids[sample.trained].tolist(), skip_special_tokens=False)
