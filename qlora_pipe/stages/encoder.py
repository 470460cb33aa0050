"""How a model's examples become samples, as `finetune` and `preview` have it alike."""

from collections.abc import Callable

import pluggy

from qlora_pipe.architecture import Architecture
from qlora_pipe.artifacts import Checkpoint, QuantizedCheckpoint
from qlora_pipe.config import DataConfig
from qlora_pipe.data.encode import Encoder
from qlora_pipe.data.render import FROZEN_NOW
from qlora_pipe.data.templates import Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError
from qlora_pipe.nn.seq2seq import start_id_of


def encoder_of(
    base: Checkpoint | QuantizedCheckpoint,
    architecture: Architecture,
    config: DataConfig,
    *,
    manager: pluggy.PluginManager,
    note: Callable[[str], None],
) -> Encoder:
    """Say how examples become samples of this model; ConfigError where it can't be trained so."""
    if config.pack and not architecture.packs:
        raise ConfigError(f"models of the family {architecture.name} cannot be trained with --pack; leave it out.")
    tokenizer = Tokenizer.open(base.path)
    templates = Templates.open(base.path, tokenizer, choice=config.template, manager=manager)
    if templates.names_the_day:
        note(f"the chat template asks for today's date; it is always told {FROZEN_NOW:%d %B %Y}.")
    start_id = start_id_of(base.config) if architecture.kind == "seq2seq" else None
    return Encoder(
        tokenizer=tokenizer,
        max_tokens=config.max_tokens,
        templates=templates,
        train_on=config.train_on,
        kind=architecture.kind,
        start_id=start_id,
    )
