"""The LLaMA family: what is quantised and adapted of it. The modules are in model.py, imported when one is built."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.fields import Fields

if TYPE_CHECKING:
    import torch

_LINEARS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj")


def build(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Make the model a config.json describes; ConfigError names a field that it can't take."""
    from qlora_plugins.llama.model import Llama, LlamaConfig

    return Llama(LlamaConfig.read(config))


def ties(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Say whether the head shares the embedding's storage."""
    tied = Fields(config).flag("tie_word_embeddings", default=False)
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


@hookimpl
def register_architectures() -> list[Architecture]:
    """LLaMA 1 to 3, and what was built like them."""
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
            ties=ties,
        )
    ]
