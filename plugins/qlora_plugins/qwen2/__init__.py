"""The Qwen2 family (arXiv 2407.10671, 2412.15115): LLaMA's decoder with biases of queries, keys and values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.sizes import Sizes, tied_head, windows_from

if TYPE_CHECKING:
    from qlora_pipe.nn.decoder import DecoderConfig, DecoderModel

_LINEARS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj")

# The config.json of the smallest checkpoint that has all of the family: for tests.
TINY: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 128,
    "max_window_layers": 2,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read(config: Mapping[str, Any]) -> "DecoderConfig":
    """Read a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

    `sliding_window` counts only where `use_sliding_window` is true.
    """
    from qlora_pipe.nn.attention import Scores
    from qlora_pipe.nn.decoder import DecoderConfig

    fields = Fields(config)
    sizes = Sizes.read(fields)
    return replace(
        DecoderConfig.read(fields, sizes, positions=32_768),
        scores=tuple(Scores(window=window) for window in windows_from(fields, layers=sizes.layers)),
        qkv_bias=True,
    )


def build(config: Mapping[str, Any]) -> "DecoderModel":
    """Make the model that a config.json describes."""
    from qlora_pipe.nn.decoder import DecoderModel

    return DecoderModel(read(config))


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen2 and Qwen2.5, whose small sizes have a tied head, and what was built like them."""
    return [
        Architecture(
            name="qwen2",
            model_types=("qwen2",),
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
