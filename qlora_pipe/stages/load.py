"""Load: from a folder to a model in memory. The one stage whose result cannot lie on disk."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_formats.store import StoredWeight
from qlora_kernels import cpu
from qlora_pipe.architecture import Architecture, matches
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint
from qlora_pipe.config import Device, DType
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.nn.adapt import attach_adapter
from qlora_pipe.nn.linear import QuantizedLinear, quantized_tensor, replace_module
from qlora_pipe.nn.loaded import LoadedModel, tie

# Tables that older checkpoints carry although they follow from the config.
_DERIVED = ("*.*.*.*.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

# The types that a setting may name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: Device) -> torch.device:
    """Turn a setting into a device; ConfigError where a GPU was asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, and torch sees no GPU here; use --device cpu.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def note_slow_kernels(device: torch.device, note: Callable[[str], None]) -> None:
    """Tell `note` where 4-bit weights go through plain torch because the C kernels were not built."""
    if device.type == "cpu" and cpu.paths() == ("torch",):
        note(f"4-bit weights are handled by {cpu.description()}.")


def choose_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """Turn a setting into the type to compute in: auto is bfloat16 or float16 on a GPU, float32 on a CPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load(
    base: Checkpoint | QuantizedCheckpoint,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | None = None,
) -> LoadedModel:
    """Build the model on the meta device and fill it with views of the mapped file.

    On a CPU the packed bytes are never copied. 16-bit tensors are converted where `dtype` is another. Raises DataError
    where the folder's tensors and the model's parameters do not agree in names or shapes, or the adapter does not fit.
    """
    with torch.device("meta"):
        module = architecture.build(base.config)
    _fill(module, base, architecture, dtype=dtype, device=device)
    if adapter is not None:
        attach_adapter(module, adapter.folder.config, adapter.folder.pairs)
    module.requires_grad_(False)
    module.eval()
    return LoadedModel(module, architecture, base.config, base.weights.generation_config, dtype, device)


def require_weight_type(weight: Tensor, *, name: str) -> None:
    """Raise DataError unless a tensor's type is one that weights are computed with: float32, its halves, or float64."""
    if weight.dtype not in (torch.float64, *DTYPES.values()):
        kind = str(weight.dtype).removeprefix("torch.")
        raise DataError(f"{name} holds {kind} where weights in {', '.join(DTYPES)} or float64 are read.")


def _fill(
    module: nn.Module,
    base: Checkpoint | QuantizedCheckpoint,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    ties = architecture.ties(base.config)
    wanted = dict(module.state_dict(keep_vars=True))
    names = [name for name in base.weights.names if name not in ties]
    present = {*names, *ties}
    missing = [name for name in wanted if name not in present]
    unknown = [name for name in names if name not in wanted and not matches(name, _DERIVED)]
    if missing:
        raise DataError(
            f"{base.path.name} lacks the tensor {missing[0]} of a {architecture.name} model{_more(missing)}."
        )
    if unknown:
        raise DataError(
            f"{base.path.name} holds the tensor {unknown[0]}, which a {architecture.name} model with this config"
            f" does not have{_more(unknown)}."
        )
    for name in names:
        if name in wanted:
            stored = base.weights.weight(name) if isinstance(base, QuantizedCheckpoint) else base.weights.tensor(name)
            if tuple(stored.shape) != tuple(wanted[name].shape):
                raise DataError(
                    f"{base.path.name}: {name} has shape {list(stored.shape)}, and its config asks for"
                    f" {list(wanted[name].shape)}."
                )
            _place(module, name, stored, dtype=dtype, device=device)
    tie(module, ties)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _place(
    module: nn.Module, name: str, stored: "Tensor | StoredWeight", *, dtype: torch.dtype, device: torch.device
) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(stored, StoredWeight):
        if not isinstance(owner, nn.Linear) or leaf != "weight":
            raise DataError(
                f"{name} is stored in 4 bits, and only the weights of linear layers can be computed with so."
            )
        bias = getattr(owner, "bias", None)
        layer = QuantizedLinear(quantized_tensor(stored, name=name), bias=None).to(device)
        # A bias that came first is kept, one that comes later finds the new layer.
        layer.bias = bias
        replace_module(module, path, layer)
        return
    require_weight_type(stored, name=name)
    # A float64 model is wanted by tests alone; everything a user computes in is at most 32 bits wide.
    setattr(owner, leaf, nn.Parameter(stored.to(device=device, dtype=dtype), requires_grad=False))
