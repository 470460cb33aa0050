"""The fields of a T5's config.json that the computation depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.seq2seq import start_id_of
from qlora_plugins.t5.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Config:
    """What of config.json decides how the model is built and what it computes."""

    vocabulary: int
    hidden: int
    inner: int
    heads: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int
    buckets: int
    farthest: int
    table_per_layer: bool
    activation: str
    gated: bool
    norm_eps: float
    output_scale: float
    start_id: int

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Check a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

        The defaults of absent fields are the format's own. `dropout_rate` belongs to a training recipe, and
        `initializer_factor` to first values: neither changes what the model computes.
        """
        config = Fields(values)
        kind = config.choice("model_type", ("t5", "mt5", "umt5"), default="t5")
        hidden = config.integer("d_model", most=2**20)
        buckets = config.integer("relative_attention_num_buckets", least=4, most=2**16, default=32)
        nearest = buckets // 2 + 1
        farthest = config.integer("relative_attention_max_distance", least=nearest, most=2**31 - 1, default=128)
        layers = config.integer("num_layers", most=2**12)
        activation, is_gated = _feed_forward(config, default="relu" if kind == "t5" else "gated-gelu")
        return cls(
            vocabulary=config.integer("vocab_size", most=2**26),
            hidden=hidden,
            inner=config.integer("d_ff", most=2**23),
            heads=config.integer("num_heads", most=2**16),
            head_dim=config.integer("d_kv", most=2**16),
            encoder_layers=layers,
            decoder_layers=config.integer("num_decoder_layers", most=2**12, default=layers),
            buckets=buckets,
            farthest=farthest,
            table_per_layer=kind == "umt5",
            activation=activation,
            gated=is_gated,
            norm_eps=config.number("layer_norm_epsilon", above=0, at_most=1, default=1e-6),
            output_scale=hidden**-0.5 if _scales(config, kind) else 1.0,
            start_id=start_id_of(values),
        )


def _feed_forward(config: Fields, *, default: str) -> tuple[str, bool]:
    """The activation of the feed-forward layers, and whether it gates; their own fields go before the old one."""
    named = config.values["feed_forward_proj"] if config.has("feed_forward_proj") else default
    if not isinstance(named, str) or named.removeprefix("gated-") not in ACTIVATIONS:
        raise config.error("feed_forward_proj", f"one of {', '.join(ACTIVATIONS)}, or gated- and one of them")
    # What is called so there has always been the approximation by tanh.
    activation = "gelu_new" if named == "gated-gelu" else named.removeprefix("gated-")
    return (
        config.choice("dense_act_fn", ACTIVATIONS.keys(), default=activation),
        config.flag("is_gated_act", default=named.startswith("gated-")),
    )


def _scales(config: Fields, kind: str) -> bool:
    """Whether what goes into the head is multiplied by D ** -0.5, as transformers 5.23 does it."""
    tied = config.flag("tie_word_embeddings", default=True)
    own = config.flag("scale_decoder_outputs", default=tied)
    return {"t5": own, "mt5": False, "umt5": True}[kind]
