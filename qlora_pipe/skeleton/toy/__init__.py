"""The toy family: what of it is quantised and adapted. The modules are in model.py, imported when one is built."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch


def build(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Make the model a config.json describes; ConfigError names a field that it can't take."""
    # torch takes seconds to import, and listing the plugins should not wait for it.
    from qlora_pipe.skeleton.toy.model import Toy, ToyConfig

    return Toy(ToyConfig.read(config))


ARCHITECTURE = Architecture(
    name="toy",
    model_types=("toy",),
    kind="causal",
    task_type="CAUSAL_LM",
    build=build,
    blocks=("layers.*",),
    quantize=("layers.*.*_proj.weight",),
    keep_16bit=("lm_head",),
    adapt=("layers.*.*_proj",),
    packs=True,
    tiny={
        "model_type": "toy",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 259,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Bring the toy family."""
    return [ARCHITECTURE]
