"""The Mistral family (arXiv 2310.06825): LLaMA's decoder, of which v0.1 attends to the last 4096 positions only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.sizes import MOST_POSITIONS, Sizes, tied_head

if TYPE_CHECKING:
    from qlora_pipe.nn.decoder import DecoderConfig, DecoderModel

_LINEARS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj")

# What a config means that says nothing of it; null says that attention reaches every earlier token.
_WINDOW = 4096

# The config.json of the smallest checkpoint that has all of the family: for tests.
TINY: Mapping[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": 48,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read(config: Mapping[str, Any]) -> "DecoderConfig":
    """Read a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here."""
    from qlora_pipe.nn.attention import Scores
    from qlora_pipe.nn.decoder import DecoderConfig

    fields = Fields(config)
    if fields.has("layer_types"):
        raise fields.error("layer_types", "absent: all layers of a Mistral have the same window")
    sizes = Sizes.read(fields)
    window = None
    if config.get("sliding_window", _WINDOW) is not None:
        window = fields.integer("sliding_window", most=MOST_POSITIONS, default=_WINDOW)
    return replace(
        DecoderConfig.read(fields, sizes, positions=131_072),
        scores=(Scores(window=window),) * sizes.layers,
    )


def build(config: Mapping[str, Any]) -> "DecoderModel":
    """Make the model that a config.json describes."""
    from qlora_pipe.nn.decoder import DecoderModel

    return DecoderModel(read(config))


@hookimpl
def register_architectures() -> list[Architecture]:
    """Mistral 7B and Nemo, and what was built like them."""
    return [
        Architecture(
            name="mistral",
            model_types=("mistral",),
            kind="causal",
            task_type="CAUSAL_LM",
            build=build,
            blocks=("model.layers.*",),
            quantize=tuple(f"{path}.weight" for path in _LINEARS),
            keep_16bit=("lm_head",),
            adapt=_LINEARS,
            packs=True,
            ties=tied_head,
            tiny=TINY,
        )
    ]
