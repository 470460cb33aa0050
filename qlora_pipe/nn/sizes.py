"""What decoders of the LLaMA kind read from config.json in the same words: sizes, a tied head, windows of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qlora_pipe.nn.fields import Fields

MOST_LAYERS = 2**12
MOST_POSITIONS = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes of a decoder: D = `hidden`, H = `heads`, KV = `kv_heads`, each of which H / KV heads share."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def read(cls, config: Fields, *, head_dim: int | None = None) -> Self:
        """Read them; ConfigError names a field that is missing or absurd.

        Heads that the config does not give a size have `head_dim` components, or share the hidden ones evenly.
        """
        hidden = config.integer("hidden_size", most=2**20)
        heads = config.integer("num_attention_heads", most=2**16)
        kv_heads = config.integer("num_key_value_heads", most=heads, default=heads)
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
        if head_dim is None and not config.has("head_dim") and hidden % heads:
            raise config.error("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim be given")
        head_dim = config.integer("head_dim", most=2**16, default=head_dim or hidden // heads)
        if head_dim % 2:
            raise config.error("head_dim", f"even, as rotary embeddings turn pairs (here it is {head_dim})")
        return cls(
            vocabulary=config.integer("vocab_size", most=2**26),
            hidden=hidden,
            intermediate=config.integer("intermediate_size", most=2**23),
            layers=config.integer("num_hidden_layers", most=MOST_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )


def tied_head(config: Mapping[str, Any], *, default: bool = False) -> Mapping[str, str]:
    """Say as an Architecture's `ties` does whether the head shares the embedding's storage."""
    tied = Fields(config).flag("tie_word_embeddings", default=default)
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def windows_from(config: Fields, *, layers: int) -> tuple[int | None, ...]:
    """Read the window of each layer's attention, in positions; None where it sees all that came before.

    `use_sliding_window` turns windows on. Which layers have one, `layer_types` says, or else all from
    `max_window_layers` on.
    """
    kinds = ("full_attention", "sliding_attention")
    on = config.flag("use_sliding_window", default=False)
    window = config.integer("sliding_window", most=MOST_POSITIONS, default=4096) if on else None
    first = config.integer("max_window_layers", least=0, most=MOST_LAYERS, default=28) if on else layers
    slides = [layer >= first for layer in range(layers)]
    if config.has("layer_types"):
        slides = [kind == kinds[1] for kind in config.choices("layer_types", kinds, count=layers)]
    if any(slides) and not on:
        raise config.error("layer_types", "full_attention throughout, as use_sliding_window is not true")
    return tuple(window if each else None for each in slides)
