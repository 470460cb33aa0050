"""What a plugin says of a chat template: its name and its Jinja text."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A named form of conversations, for checkpoints that carry none."""

    name: str
    help: str
    """One line for `qlora-pipe plugins`."""
    source: str
    """Jinja, as in `chat_template` of a tokenizer_config.json: it sees `messages` (each a role and a content),
    `add_generation_prompt`, `bos_token` and `eos_token`."""
