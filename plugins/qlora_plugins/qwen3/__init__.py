"""The Qwen3 family (arXiv 2505.09388), its dense models: LLaMA's decoder with norms of each head's queries and keys."""

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
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read(config: Mapping[str, Any]) -> "DecoderConfig":
    """Read a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

    A head has 128 components unless `head_dim` says otherwise, whatever the hidden size.
    """
    from qlora_pipe.nn.attention import Scores
    from qlora_pipe.nn.decoder import DecoderConfig

    fields = Fields(config)
    sizes = Sizes.read(fields, head_dim=128)
    attention_bias = fields.flag("attention_bias", default=False)
    return replace(
        DecoderConfig.read(fields, sizes, positions=32_768),
        scores=tuple(Scores(window=window) for window in windows_from(fields, layers=sizes.layers)),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        head_norms=True,
    )


def build(config: Mapping[str, Any]) -> "DecoderModel":
    """Make the model that a config.json describes."""
    from qlora_pipe.nn.decoder import DecoderModel

    return DecoderModel(read(config))


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen3 from 0.6B to 32B, and what was built like them."""
    return [
        Architecture(
            name="qwen3",
            model_types=("qwen3",),
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
