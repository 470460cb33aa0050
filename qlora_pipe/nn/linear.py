"""Linear layers over a frozen base: 4-bit weights, and LoRA on top of 4-bit or 16-bit ones."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora_formats.store import StoredWeight
from qlora_kernels.levels import recognise
from qlora_kernels.linear import Layer, lora_linears
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.quantized_matmul import quantized_matmul, serves
from qlora_kernels.scratch import Scratch
from qlora_pipe.errors import DataError

# What is small of a weight, and read as a whole before it is used.
TABLES = ("levels", "nested_absmax", "nested_levels")
_TENSORS = ("codes", "absmax", "levels", "nested_absmax", "nested_levels", "offset")


def quantized_tensor(stored: StoredWeight, *, name: str, tables: Mapping[str, Tensor] | None = None) -> QuantizedTensor:
    """Join what a store holds of a weight with the arithmetic that reads it.

    `tables` gives the small tensors by their fields where those of `stored` are on their way to a device. Raises
    DataError where the stored table of levels is neither NF4's nor FP4's, or the scales of the scales are not finite:
    it would dequantise to nonsense.
    """
    tables = tables or {field: part for field in TABLES if (part := getattr(stored, field)) is not None}
    if recognise(tables["levels"]) != stored.kind:
        raise DataError(f"{name}: its quant_map is not {stored.kind}'s table of levels; the file is of another format.")
    # These are few; the scales themselves are as many as blocks, and are not read before they are used.
    for part, table in tables.items():
        if part != "levels" and not bool(torch.isfinite(table).all()):
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

    @property
    def layer(self) -> Layer:
        """The layer as the kernels take it."""
        return Layer(self.frozen, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; a dense weight, if there is one, lives for the length of one product."""
        return project(x, self)[0]


class LoraLinear(nn.Module):
    """y = x W^T + bias + scale * dropout(x) A^T B^T (Hu et al., 2021, arXiv 2106.09685), with W frozen.

    A [rank, in] and B [out, rank] are float32 parameters. B starts at zero, so a new adapter changes nothing.
    """

    def __init__(self, base: "nn.Linear | QuantizedLinear", *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout = scale, dropout
        device = base.levels.device if isinstance(base, QuantizedLinear) else base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.seed: int | None = None
        """The seed of the dropout mask; None draws one from torch's CPU generator in each forward pass."""

    @property
    def weight(self) -> Tensor:
        """The base's weight where that is dense, for models of others that look at its type."""
        if isinstance(self.base, QuantizedLinear):
            raise AttributeError("a weight in 4 bits has no tensor of its own")
        return self.base.weight

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
    def drops(self) -> bool:
        """Whether parts of its input are dropped."""
        return self.training and self.dropout > 0

    @property
    def scratch(self) -> Scratch | None:
        """Where the base's dense weight is made."""
        return self.base.scratch if isinstance(self.base, QuantizedLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] through the base and the adapter."""
        return project(x, self)[0]


def project(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Apply linear layers that share their input x [..., in]: one [..., out] each.

    Adapters that drop alike are computed as one, with one dropout mask for their input. In a step of generation, which
    is one position and wants no gradient, no weight is made dense: the products then have other last bits.
    """
    if (products := _packed(x, layers)) is not None:
        return products
    kinds = {(type(layer), getattr(layer, "dropout", None)) for layer in layers}
    if len(kinds) > 1 or not isinstance(layers[0], LoraLinear | QuantizedLinear):
        return [layer(x) for layer in layers]
    first = layers[0]
    drops = isinstance(first, LoraLinear) and first.drops
    seed = first.seed if isinstance(first, LoraLinear) else None
    if drops and seed is None:
        seed = int(torch.randint(1 << 62, ()))
    return lora_linears(
        x,
        [layer.layer for layer in layers if isinstance(layer, LoraLinear | QuantizedLinear)],
        dropout=first.dropout if isinstance(first, LoraLinear) and drops else 0.0,
        seed=seed if drops else None,
        scratch=first.scratch,
    )


def _packed(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """The layers' outputs where their weights can stay packed; None where not."""
    # Training computes a block twice, once without gradients, and both must give the same bits.
    if torch.is_grad_enabled() or layers[0].training or x.dim() < 2 or x.shape[-2] != 1:
        return None
    known = [layer for layer in layers if isinstance(layer, LoraLinear | QuantizedLinear)]
    described = [layer.layer for layer in known]
    weights = [part.weight for part in described if isinstance(part.weight, QuantizedTensor)]
    if len(weights) < len(layers) or not serves(x, weights):
        return None
    products = quantized_matmul(x, weights)
    adapted = [(y, part) for y, part in zip(products, described, strict=True) if part.lora_a is not None]
    for y, part in zip(products, described, strict=True):
        if part.bias is not None:
            y.add_(part.bias.to(y.dtype))
    if adapted:
        a_RI = torch.cat([part.lora_a for _, part in adapted if part.lora_a is not None]).to(x.dtype)
        xa_TR = x.reshape(-1, x.shape[-1]) @ a_RI.T
        start = 0
        for y, part in adapted:
            assert part.lora_b is not None
            rank = part.lora_b.shape[1]
            own_TR = xa_TR[:, start : start + rank]
            y.view(-1, y.shape[-1]).addmm_(own_TR, part.lora_b.to(x.dtype).T, alpha=part.scale)
            start += rank
    return products


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
