"""The gated feed-forward layer (arXiv 2002.05202), parameters named as in checkpoints of the LLaMA kind."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from qlora_kernels.gated import geglu, swiglu
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.linear import project

Gate = Callable[[Tensor, Tensor], Tensor]
"""Of a gate and what it lets through, both [..., I]: what passes. It may overwrite either."""

# The projections' outputs are nobody else's, so backward may take their place.
GATES: Mapping[str, Gate] = {
    "silu": partial(swiglu, inplace=True),
    "gelu": partial(geglu, inplace=True),
    "gelu_pytorch_tanh": partial(geglu, approximate="tanh", inplace=True),
    "relu": lambda gate, up: functional.relu(gate) * up,
}


def gate_from(config: Fields, name: str = "hidden_act", *, default: str = "silu") -> Gate:
    """Find the gate that a config names; ConfigError lists those there are."""
    return GATES[config.choice(name, GATES.keys(), default=default)]


class GatedMLP(nn.Module):
    """down(gate(gate_proj x, up_proj x))."""

    def __init__(self, hidden: int, intermediate: int, *, gate: Gate, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        gated: Tensor = self.down_proj(self.gate(gate, up))
        return gated
