"""Linear layers over a frozen base: 4-bit weights, and LoRA on top of 4-bit or 16-bit ones."""

import math

import torch
from torch import Tensor, nn

from qlora_formats.store import StoredWeight
from qlora_kernels.levels import recognise
from qlora_kernels.linear import Layer, lora_linear, lora_linears
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.scratch import Scratch
from qlora_pipe.errors import DataError

_TENSORS = ("codes", "absmax", "levels", "nested_absmax", "nested_levels", "offset")


def quantized_tensor(stored: StoredWeight, *, name: str) -> QuantizedTensor:
    """Join what a store holds of a weight with the arithmetic that reads it.

    Raises DataError where the stored table of levels is neither NF4's nor FP4's, or the scales of the scales are not
    finite: it would dequantise to nonsense.
    """
    if recognise(stored.levels) != stored.kind:
        raise DataError(f"{name}: its quant_map is not {stored.kind}'s table of levels; the file is of another format.")
    # These are few; the scales themselves are as many as blocks, and are not read before they are used.
    for part in ("nested_absmax", "nested_levels"):
        table = getattr(stored, part)
        if table is not None and not bool(torch.isfinite(table).all()):
            raise DataError(
                f"{name}: its {part.replace('levels', 'quant_map')} holds NaN or infinity; the file is damaged."
            )
    return QuantizedTensor(**{field: getattr(stored, field) for field in QuantizedTensor._fields})


class QuantizedLinear(nn.Module):
    """y = x W^T + bias, with W [out, in] frozen in 4 bits. The bytes are buffers, never parameters."""

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    nested_absmax: Tensor | None
    nested_levels: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: QuantizedTensor, *, bias: Tensor | None = None) -> None:
        super().__init__()
        for name in _TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.block_size, self.nested_block_size = weight.block_size, weight.nested_block_size
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scratch: Scratch | None = None
        """Where its dense weight is made; None for new memory each time."""

    @property
    def frozen(self) -> QuantizedTensor:
        """The weight as the kernels take it: views of the buffers, wherever the module has been moved."""
        return QuantizedTensor(
            **{name: getattr(self, name) for name in _TENSORS},
            block_size=self.block_size,
            nested_block_size=self.nested_block_size,
            shape=(self.out_features, self.in_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; the dense weight lives for the length of one product."""
        return lora_linear(x, self.frozen, bias=self.bias, scratch=self.scratch)


class LoraLinear(nn.Module):
    """y = x W^T + bias + scale * dropout(x) A^T B^T (Hu et al., 2021, arXiv 2106.09685), with W frozen.

    A [rank, in] and B [out, rank] are float32 parameters. B starts at zero, so a new adapter changes nothing.
    """

    def __init__(self, base: "nn.Linear | QuantizedLinear", *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout = scale, dropout
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.seed: int | None = None
        """The seed of the dropout mask; None draws one from torch's CPU generator in each forward pass."""

    def reset(self) -> None:
        """Draw A from torch's CPU generator, so that a seed gives the same adapter on every device."""
        start = torch.empty(self.lora_a.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        with torch.no_grad():
            self.lora_a.copy_(start)
            self.lora_b.zero_()

    @property
    def layer(self) -> Layer:
        """The layer as the kernels take it."""
        base = self.base
        weight = base.frozen if isinstance(base, QuantizedLinear) else base.weight
        return Layer(weight, base.bias, self.lora_a, self.lora_b, self.scale)

    @property
    def scratch(self) -> Scratch | None:
        """Where the base's dense weight is made."""
        return self.base.scratch if isinstance(self.base, QuantizedLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] through the base and the adapter."""
        return _together(x, [self])[0]


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Apply linear layers that share their input x [..., in]: one [..., out] each.

    Adapters that drop alike are computed as one, with one dropout mask for their input.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if len(adapted) < len(layers) or len({layer.dropout for layer in adapted}) > 1:
        return [layer(x) for layer in layers]
    return list(_together(x, adapted))


def _together(x: Tensor, layers: list[LoraLinear]) -> tuple[Tensor, ...]:
    first = layers[0]
    drops = first.training and first.dropout > 0
    seed = first.seed
    if drops and seed is None:
        seed = int(torch.randint(1 << 62, ()))
    return lora_linears(
        x,
        [layer.layer for layer in layers],
        dropout=first.dropout if drops else 0.0,
        seed=seed if drops else None,
        scratch=first.scratch,
    )


def frozen_weight(layer: nn.Module) -> Tensor | None:
    """The weight [out, in] of a plain linear layer without a bias that is frozen; None for any other."""
    if type(layer) is nn.Linear and layer.bias is None and not layer.weight.requires_grad:
        return layer.weight
    return None


def share_scratch(model: nn.Module) -> Scratch:
    """Give all 4-bit layers of a model one place to make their dense weights in."""
    scratch = Scratch()
    for part in model.modules():
        if isinstance(part, QuantizedLinear):
            part.scratch = scratch
    return scratch


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where `path` points, `model.layers.0.mlp.up_proj`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def linear_modules(model: nn.Module) -> dict[str, "nn.Linear | QuantizedLinear"]:
    """Every linear layer of a model by its path, with those already under an adapter left out."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and not path.endswith(".base")
    }
