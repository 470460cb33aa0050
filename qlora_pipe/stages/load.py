"""Load: from a folder to a model in memory. The one stage whose result cannot lie on disk."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlora_formats.store import Store, StoredWeight
from qlora_kernels import cpu
from qlora_kernels.quantized import QuantizedTensor
from qlora_pipe.architecture import Architecture, block_of, matches
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint
from qlora_pipe.config import Device, DType, Residency
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.nn.adapt import attach_adapter
from qlora_pipe.nn.language import LanguageModel
from qlora_pipe.nn.linear import TABLES, QuantizedLinear, quantized_tensor, replace_module
from qlora_pipe.nn.loaded import LoadedModel, tie
from qlora_pipe.residency.choice import AtRest, Lives, Way, choose
from qlora_pipe.residency.image import Part
from qlora_pipe.residency.layout import Layout, Placed, ResidentLayout, StreamedLayout
from qlora_pipe.residency.mapped import MappedLayout
from qlora_pipe.train.memory import free_bytes

# Tables that older checkpoints carry although they follow from the config.
_DERIVED = ("*.*.*.*.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

# How much of the free host memory the weights may take up for good.
_HOST_SHARE = 0.8

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


def choose_dtype(dtype: DType, device: torch.device, architecture: Architecture) -> torch.dtype:
    """Turn a setting into the type to compute in: auto is bfloat16 or float16 on a GPU, float32 on a CPU.

    ConfigError where float16 was asked for and the family is not computed in it; auto is float32 there.
    """
    if dtype == "float16" and architecture.no_float16 is not None:
        raise ConfigError(
            f"models of the family {architecture.name} are not computed in float16, because"
            f" {architecture.no_float16}; use --dtype bfloat16 or float32."
        )
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if architecture.no_float16 is None else torch.float32


def load(
    base: Checkpoint | QuantizedCheckpoint,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | None = None,
    residency: Residency = "auto",
    step_bytes: int = 1 << 30,
    note: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """Build the model on the meta device and give it tensors that live where `residency` says.

    On a CPU, unless they are to be streamed, they are views of the mapped file: packed bytes are never copied, and
    16-bit tensors are converted where `dtype` is another. By `step_bytes`, what the work takes besides the weights,
    auto tells whether all fits on a GPU; `note` takes a sentence on that. Raises DataError where the folder's tensors
    and the model's parameters do not agree in names or shapes, or the adapter does not fit; ConfigError where a
    residency is not to be had.
    """
    way: Way = "resident"
    if residency != "auto":
        way = residency
    elif device.type == "cuda":
        weight_bytes = sum(each.part.n_bytes for each in placed(base, architecture, dtype=dtype))
        way, reason = choose(weight_bytes=weight_bytes, step_bytes=step_bytes, free_bytes=free_bytes(device))
        note(reason)
    if device.type == "cpu" and way != "streamed":
        module = _built(base, architecture)
        _fill(module, base, architecture, dtype=dtype)
        lives: Lives = AtRest("resident")
    else:
        with _layout(way, placed(base, architecture, dtype=dtype), device=device, note=note) as layout:
            # What is to live on the device is on its way meanwhile.
            module = _built(base, architecture)
            blocks = _blocks(module)
            if way == "streamed" and "" in blocks:
                raise ConfigError(
                    f"models of the family {architecture.name} are one block and can't be streamed; a GPU must hold all"
                    " of it: --residency resident, or a smaller model."
                )
            layout.lay_blocks(blocks)
            _fill(module, base, architecture, dtype=dtype, part=layout.tensor)
            _settle_offsets(module, device)
        lives = layout.lives()
    if adapter is not None:
        attach_adapter(module, adapter.folder.config, adapter.folder.pairs)
    module.requires_grad_(False)
    module.eval()
    return LoadedModel(module, architecture, base.config, base.weights.generation_config, dtype, device, lives)


def placed(base: Checkpoint | QuantizedCheckpoint, architecture: Architecture, *, dtype: torch.dtype) -> list[Placed]:
    """The tensors that a model is made from: which file they are in, in which type they are wanted, and where."""
    weights = base.weights
    ties = architecture.ties_of(base.config, weights.names)
    found = []
    for name in weights.names:
        if name in ties or matches(name, (*_DERIVED, *architecture.unread)):
            continue
        folder, parts = (
            (weights.folder, weights.parts(name)) if isinstance(weights, Store) else (weights, {"tensor": name})
        )
        block = None if matches(name, architecture.shared) else block_of(name, architecture.blocks)
        for field, part in parts.items():
            wanted = dtype if field == "tensor" else folder.info(part).dtype
            packed = field in {"codes", "absmax"}
            found.append(Placed(Part(part, folder.file_of(part), wanted), block, packed))
    return found


def _layout(way: Way, tensors: list[Placed], *, device: torch.device, note: Callable[[str], None]) -> Layout:
    if way == "resident":
        return ResidentLayout(tensors, device=device)
    # Host memory is of use where a GPU copies from it by itself, and some is left to the system.
    room = int(free_bytes(torch.device("cpu")) * _HOST_SHARE) if device.type == "cuda" else 0
    if way == "mapped":
        return MappedLayout(tensors, device=device, room=room)
    return StreamedLayout(tensors, device=device, room=room, note=note)


def _built(base: Checkpoint | QuantizedCheckpoint, architecture: Architecture) -> nn.Module:
    with torch.device("meta"), _WithoutValues():
        return architecture.build(base.config)


class _WithoutValues(TorchFunctionMode):
    """Leaves out the drawing of first values, which on the meta device are none.

    The first draw there imports torch's compiler, which takes a second, and each takes a part of a millisecond.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """A model's blocks by their paths, in the order in which they run."""
    paths = {id(part): path for path, part in module.named_modules()}
    return {paths[id(block)]: block for block in cast(LanguageModel, module).blocks}


def require_weight_type(dtype: torch.dtype, *, name: str) -> None:
    """Raise DataError unless a tensor's type is one that weights are computed with: float32, its halves, or float64."""
    if dtype not in (torch.float64, *DTYPES.values()):
        kind = str(dtype).removeprefix("torch.")
        raise DataError(f"{name} holds {kind} where weights in {', '.join(DTYPES)} or float64 are read.")


def _fill(
    module: nn.Module,
    base: Checkpoint | QuantizedCheckpoint,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    part: Callable[[str], Tensor] | None = None,
) -> None:
    """Give a model on the meta device its tensors: those of `part`, by their names in the files, or the files' own."""
    weights = base.weights
    ties = architecture.ties_of(base.config, weights.names)
    for name, shape in _wanted(module, base, architecture, ties).items():
        if base.shape(name) != shape:
            raise DataError(
                f"{base.path.name}: {name} has shape {list(base.shape(name))}, and its config asks for {list(shape)}."
            )
        if isinstance(weights, Store) and weights.is_quantized(name):
            stored = cast(StoredWeight, weights.weight(name, part=part))
            tables = None
            if part is not None:
                named = weights.parts(name)
                tables = {field: weights.folder.tensor(named[field]) for field in TABLES if field in named}
            _place_packed(module, name, quantized_tensor(stored, name=name, tables=tables))
        else:
            folder = weights.folder if isinstance(weights, Store) else weights
            require_weight_type(folder.info(name).dtype, name=name)
            tensor = folder.tensor(name) if part is None else part(name)
            path, _, leaf = name.rpartition(".")
            # A float64 model is wanted by tests alone; everything a user computes in is at most 32 bits wide.
            kept = nn.Parameter(tensor.to(dtype), requires_grad=False)
            setattr(module.get_submodule(path), leaf, kept)
    tie(module, ties)


def _wanted(
    module: nn.Module,
    base: Checkpoint | QuantizedCheckpoint,
    architecture: Architecture,
    ties: Mapping[str, str],
) -> dict[str, tuple[int, ...]]:
    """The tensors to take from the folder, in its order, and the shapes that the model has for them."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict(keep_vars=True).items()}
    names = [name for name in base.weights.names if name not in ties]
    present, known = {*names, *ties}, (*_DERIVED, *architecture.unread)
    missing = [name for name in shapes if name not in present]
    unknown = [name for name in names if name not in shapes and not matches(name, known)]
    if missing:
        raise DataError(
            f"{base.path.name} lacks the tensor {missing[0]} of a {architecture.name} model{_more(missing)}."
        )
    if unknown:
        raise DataError(
            f"{base.path.name} holds the tensor {unknown[0]}, which a {architecture.name} model with this config"
            f" does not have{_more(unknown)}."
        )
    return {name: shapes[name] for name in names if name in shapes}


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _place_packed(module: nn.Module, name: str, weight: QuantizedTensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if not isinstance(owner, nn.Linear) or leaf != "weight":
        raise DataError(f"{name} is stored in 4 bits, and only the weights of linear layers can be computed with so.")
    layer = QuantizedLinear(weight)
    # A bias that came first is kept, one that comes later finds the new layer.
    layer.bias = getattr(owner, "bias", None)
    replace_module(module, path, layer)


def _settle_offsets(module: nn.Module, device: torch.device) -> None:
    """Bring the scales' offsets, which lie in no file's tensors, to the device in one copy."""
    layers = [part for part in module.modules() if isinstance(part, QuantizedLinear) and part.offset is not None]
    if not layers:
        return
    # Each on a multiple of 64 bytes: Triton compiles anew for an address that is not one of 16.
    apart = torch.zeros(len(layers), 16)
    apart[:, 0] = torch.stack([cast(Tensor, layer.offset) for layer in layers])
    for layer, settled in zip(layers, apart.to(device)[:, 0].unbind(), strict=True):
        layer.offset = settled
