"""A model loaded on a CPU: packed weights are neither copied nor kept dense, and the kernels are what computes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_formats.adapter_config import AdapterConfig
from qlora_kernels import linear as kernel_linear
from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.nn.adapt import adaptable, adapters_of, add_adapters
from qlora_pipe.nn.linear import QuantizedLinear
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load
from qlora_pipe.testing import tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[1, 70, 71, 72, 9]])
LAYERS = 14


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    base = open_model(folder)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    return load(base, architecture, dtype=dtype, device=torch.device("cpu"))


def addresses_mapped_from(file: Path) -> list[range]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(f" {file}")]
    return [range(int(start, 16), int(end, 16)) for start, end in places]


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    names = ("codes", "absmax", "levels", "nested_absmax", "nested_levels")
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    return {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in names}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu_the_packed_bytes_stay_in_the_mapped_file(tmp_path: Path, dtype: torch.dtype) -> None:
    store = tmp_path / "store"
    assert execute(["quantize", str(tiny_checkpoint(tmp_path / "source")), str(store)]) == 0
    module = loaded(store, dtype=dtype).module
    (mapped,) = addresses_mapped_from(store / "model.safetensors")
    buffers = buffers_of(module)
    assert len(buffers) == 5 * LAYERS
    assert all(tensor.data_ptr() in mapped for tensor in buffers.values())
    # What is used in the type it is stored in is not copied either.
    kept = [parameter for name, parameter in module.named_parameters() if "_proj" not in name]
    assert len(kept) == 7
    assert all((parameter.data_ptr() in mapped) == (dtype == torch.float32) for parameter in kept)
    module(IDS)
    assert all(tensor.data_ptr() in mapped for tensor in buffers_of(module).values())


def test_no_dense_weight_outlives_the_product_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    assert execute(["quantize", str(tiny_checkpoint(tmp_path / "source")), str(store)]) == 0
    model = loaded(store)
    paths = adaptable(model.module, model.architecture)
    add_adapters(model.module, paths, AdapterConfig(r=2, lora_alpha=4.0), dropout=0.1)
    for layer in adapters_of(model.module).values():
        layer.lora_b.data.normal_()
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    model.module.train()
    made: list[StorageWeakRef] = []
    alive: list[int] = []

    def recording(*arguments: Any, **settings: Any) -> Tensor:
        alive.append(sum(not storage.expired() for storage in made))
        dense = dequantize(*arguments, **settings)
        made.append(StorageWeakRef(dense.untyped_storage()))
        return dense

    dequantize = kernel_linear.dequantize
    monkeypatch.setattr(kernel_linear, "dequantize", recording)
    logits = model.module(IDS)
    assert len(made) == LAYERS
    assert all(storage.expired() for storage in made), "the graph of the forward pass keeps a dense weight"
    logits.sum().backward()
    # Nothing is trained below the first layer's q, k and v, so these make no gradient for their input.
    assert len(made) == 2 * LAYERS - 3
    assert all(storage.expired() for storage in made)
    assert set(alive) == {0}, "there were two dense weights at a time"
    assert all(layer.lora_a.grad is not None for layer in adapters_of(model.module).values())


_INTERPRETED = """
import json, sys
import torch
from qlora_kernels import dequantize_triton as kernel, gated, norm, rotary
from tests.pipe.test_load_memory import IDS, loaded

launch, shapes = kernel.dequantize_triton, []
def counted(q, dtype, *, out=None):
    shapes.append(list(q.shape))
    return launch(q, dtype, out=out)
kernel.dequantize_triton = counted
# Sums of a norm come in another order on a GPU; only the weights are compared here, bit for bit.
gated.row_way = norm.row_way = rotary.row_way = lambda *_: "torch"

torch.set_num_threads(1)
for store in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            torch.save(loaded(store, dtype=dtype).module(IDS), f"{store} in {dtype}")
print(json.dumps(shapes))
"""


def test_the_models_forward_launches_the_triton_kernel_and_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    source, stores = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1), [tmp_path / "one", tmp_path / "two"]
    assert execute(["quantize", str(source), str(stores[0])]) == 0
    assert execute(["quantize", str(source), str(stores[1]), "--type", "fp4", "--no-double-quant"]) == 0
    path = os.pathsep.join(str(REPOSITORY / floor) for floor in (".", "formats", "kernels", "plugins"))
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, *map(str, stores)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    layer = [[32, 32], [16, 32], [16, 32], [32, 32], [72, 32], [72, 32], [32, 72]]
    assert sorted(json.loads(done.stdout)) == sorted(4 * layer)
    for store in stores:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.inference_mode():
                plain = loaded(store, dtype=dtype).module(IDS)
            assert plain.abs().max() > 0.5
            assert torch.equal(torch.load(f"{store} in {dtype}", weights_only=True), plain)
