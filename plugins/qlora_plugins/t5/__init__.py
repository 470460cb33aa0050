"""The T5 family: what is quantised and adapted of it. The modules are in model.py, imported when one is built."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.fields import Fields

if TYPE_CHECKING:
    import torch

_TINY: Mapping[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 72,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 279,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_STACKS = ("encoder.block.*", "decoder.block.*")
_LINEARS = (
    *(f"{stack}.layer.0.SelfAttention.{part}" for stack in _STACKS for part in "qkvo"),
    *(f"decoder.block.*.layer.1.EncDecAttention.{part}" for part in "qkvo"),
    *(f"{stack}.layer.*.DenseReluDense.{part}" for stack in _STACKS for part in ("wi*", "wo")),
)


def build(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Make the model a config.json describes; ConfigError names a field that it can't take."""
    from qlora_plugins.t5.config import T5Config
    from qlora_plugins.t5.model import T5

    return T5(T5Config.read(config))


def ties(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Say what shares the embedding's storage: both stacks' own embeddings, and the head if the config ties it."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if Fields(config).flag("tie_word_embeddings", default=True):
        names.append("lm_head.weight")
    return dict.fromkeys(names, "shared.weight")


@hookimpl
def register_architectures() -> list[Architecture]:
    """T5 in both versions and what was trained from them (Flan-T5), mT5 and UMT5."""
    return [
        Architecture(
            name="t5",
            model_types=("t5", "mt5", "umt5"),
            kind="seq2seq",
            task_type="SEQ_2_SEQ_LM",
            build=build,
            blocks=_STACKS,
            quantize=tuple(f"{path}.weight" for path in _LINEARS),
            # transformers, too, keeps `wo` in 16 bits, and would not read it in 4.
            keep_16bit=("lm_head", "wo"),
            adapt=_LINEARS,
            ties=ties,
            tiny=_TINY,
            # transformers writes tie_word_embeddings true beside a head of its own.
            untied_if_stored=("lm_head.weight",),
            unread=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
            shared=tuple(f"{stack}.layer.0.SelfAttention.relative_attention_bias.weight" for stack in _STACKS),
            no_float16="their hidden states leave its range",
        )
    ]
