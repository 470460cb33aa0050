"""Gemma 2: what is quantised and adapted of it. The modules are in model.py, imported when one is built."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.sizes import tied_head

if TYPE_CHECKING:
    import torch

_LINEARS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj")


def build(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Make the model a config.json describes; ConfigError names a field that it can't take."""
    from qlora_pipe_gemma2.model import Gemma2, Gemma2Config

    return Gemma2(Gemma2Config.of(config))


_TINY: Mapping[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "sliding_window": 7,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


ARCHITECTURE = Architecture(
    name="gemma2",
    model_types=("gemma2",),
    kind="causal",
    task_type="CAUSAL_LM",
    build=build,
    blocks=("model.layers.*",),
    quantize=tuple(f"{path}.weight" for path in _LINEARS),
    keep_16bit=("lm_head",),
    adapt=_LINEARS,
    packs=True,
    # Unless a config says otherwise.
    ties=partial(tied_head, default=True),
    tiny=_TINY,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Gemma 2 in its sizes of 2, 9 and 27 billion weights."""
    return [ARCHITECTURE]
