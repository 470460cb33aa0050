"""The LLaMA family (arXiv 2302.13971, 2307.09288, 2407.21783), from 1 to 3.3: the decoder that others vary."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.sizes import Sizes, tied_head

if TYPE_CHECKING:
    from qlora_pipe.nn.decoder import DecoderConfig, DecoderModel

_TINY: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
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
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LINEARS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj")


def read(config: Mapping[str, Any]) -> "DecoderConfig":
    """Read a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

    The defaults of absent fields are the format's own. `pretraining_tp` only says how a product was once split, and
    `attention_dropout` belongs to a training recipe: neither changes what the model computes.
    """
    from qlora_pipe.nn.decoder import DecoderConfig

    fields = Fields(config)
    if fields.has("sliding_window"):
        raise fields.error("sliding_window", "absent: a LLaMA's attention reaches every earlier token")
    sizes = Sizes.read(fields)
    attention_bias = fields.flag("attention_bias", default=False)
    return replace(
        DecoderConfig.read(fields, sizes),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def build(config: Mapping[str, Any]) -> "DecoderModel":
    """Make the model that a config.json describes."""
    from qlora_pipe.nn.decoder import DecoderModel

    return DecoderModel(read(config))


@hookimpl
def register_architectures() -> list[Architecture]:
    """LLaMA, and what was built like it."""
    return [
        Architecture(
            name="llama",
            model_types=("llama",),
            kind="causal",
            task_type="CAUSAL_LM",
            build=build,
            blocks=("model.layers.*",),
            quantize=tuple(f"{path}.weight" for path in _LINEARS),
            keep_16bit=("lm_head",),
            adapt=_LINEARS,
            packs=True,
            ties=tied_head,
            tiny=_TINY,
        )
    ]
