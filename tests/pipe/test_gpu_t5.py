"""Models of two sides on a GPU: against a CPU, and the same bits however memory is used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import Batch
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.stages.load import load
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt
from qlora_plugins.t5 import register_architectures
from tests.t5_checkpoints import t5_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module", params=["t5", "umt5"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    # FlexAttention's heads are powers of two, from 16 on.
    t5_checkpoint(folder / "source", model_type=request.param, d_model=64, d_kv=16, num_decoder_layers=3)
    assert execute(["quantize", str(folder / "source"), str(folder / "store")]) == 0
    return folder / "store"


def adapted(
    store: Path, device: str, *, dtype: torch.dtype = torch.float32, residency: Any = "resident"
) -> LoadedModel:
    (family,) = register_architectures()
    model = load(open_model(store), family, dtype=dtype, device=torch.device(device), residency=residency)
    torch.manual_seed(3)
    adapt(model, FinetuneConfig(rank=3, dropout=0.0), start=None)
    for layer in adapters_of(model.module).values():
        layer.lora_b.data.copy_(torch.randn(layer.lora_b.shape) * 0.05)
    model.module.train()
    return model


def some_batch(source: int, target: int) -> Batch:
    draws = torch.Generator().manual_seed(source)
    ids, labels, read = (torch.randint(3, 259, (3, width), generator=draws) for width in (target, target, source))
    lengths = torch.tensor([source, 1, source // 2])
    return Batch(ids=ids, labels=labels, tokens=1, trained=1, origins=(), source=read, source_lengths=lengths)


# The second batch is a target of one token; lengths differ, so the kernels are those for any length.
BATCHES = [some_batch(150, 133), some_batch(40, 1), some_batch(129, 70)]


def step(model: LoadedModel, mode: Any = "none", **settings: Any) -> list[Tensor]:
    passes = BlockwisePass(model, recompute=RecomputePlan(mode), **settings)
    losses = passes.run(BATCHES, divisor=20.0)
    parts = [part for layer in adapters_of(model.module).values() for part in (layer.lora_a, layer.lora_b)]
    return [*losses, *(part.grad for part in parts if part.grad is not None)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str)
def test_losses_and_gradients_are_those_of_a_cpu(store: Path, dtype: torch.dtype, bound: float) -> None:
    found, wanted = step(adapted(store, "cuda", dtype=dtype)), step(adapted(store, "cpu"))
    for one, other in zip(found, wanted, strict=True):
        assert float((one.float().cpu() - other).abs().max()) <= bound * float(other.abs().max())


@pytest.mark.parametrize(
    "settings", [{"mode": "all"}, {"mode": "all", "offload": True}, {"mode": "auto"}], ids="-".join
)
@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_step_gives_the_same_bits_however_it_uses_memory(
    store: Path, residency: str, settings: dict[str, Any]
) -> None:
    found = step(adapted(store, "cuda", residency=residency), **settings)
    assert all(torch.equal(one, other) for one, other in zip(found, step(adapted(store, "cuda")), strict=True))


def test_a_target_token_by_token_through_the_cache_gives_the_hidden_states_of_the_whole(store: Path) -> None:
    model, batch = adapted(store, "cuda"), BATCHES[2]
    model.module.eval()
    inputs = batch.inputs_on(model.device)
    assert inputs.source is not None
    assert inputs.source_lengths is not None
    with torch.inference_mode():
        memory = model.seq2seq.encode(inputs.source, inputs.source_lengths)
        cache = model.seq2seq.new_cache(memory, inputs.source_lengths, capacity=inputs.ids.shape[1])
        pieces = inputs.ids.split([20] + [1] * 50, dim=1)
        hidden = torch.cat([model.seq2seq.decode(piece, cache=cache) for piece in pieces], dim=1)
        torch.testing.assert_close(hidden, model.language.hidden_of(inputs), rtol=1e-3, atol=1e-3)
