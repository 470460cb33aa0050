"""Where weights live on a GPU: the same bits each way, copies beside the computation, and memory that says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig, Recompute
from qlora_pipe.data.batches import Batch
from qlora_pipe.lanes import CudaLane
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.linear import QuantizedLinear
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.residency import pinned
from qlora_pipe.residency.layout import StreamedLayout
from qlora_pipe.residency.ring import Ring
from qlora_pipe.stages import load as loading
from qlora_pipe.stages.load import load
from qlora_pipe.testing import tiny_checkpoint
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
BLOCKS = 6


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Fused attention adds up gradients in no fixed order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of a megabyte, so that copies and products take a while."""
    folder = tmp_path_factory.mktemp("residency")
    source = tiny_checkpoint(
        folder / "source",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    assert execute(["quantize", str(source), str(folder / "store")]) == 0
    return folder / "store"


def loaded(store: Path, residency: Any, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    base = open_model(store)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    return load(base, architecture, dtype=dtype, device=torch.device("cuda"), residency=residency)


def trained(model: LoadedModel, *, recompute: Recompute, together: int = 1) -> list[Tensor]:
    """Losses and gradients of three steps."""
    torch.manual_seed(3)
    adapt(model, FinetuneConfig(rank=8, dropout=0.1), start=None)
    for layer in adapters_of(model.module).values():
        torch.nn.init.normal_(layer.lora_b, std=0.05, generator=torch.Generator("cuda").manual_seed(1))
    model.module.train()
    passes = BlockwisePass(model, recompute=RecomputePlan(recompute))
    ids = torch.randint(3, 200, (4, 257), generator=torch.Generator().manual_seed(5))
    batch = Batch(ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), tokens=1024, trained=1024, origins=())
    found = [loss for _ in range(3) for loss in passes.run([batch] * together, divisor=1024.0)]
    parts = [part for layer in adapters_of(model.module).values() for part in (layer.lora_a, layer.lora_b)]
    return [part.cpu() for part in found + [part.grad for part in parts if part.grad is not None]]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(bool(torch.isfinite(one).all()) for one in ours)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_lane_copies_after_what_it_was_told_to_and_the_computation_goes_on_after_it() -> None:
    lane = CudaLane(torch.device("cuda"))
    source, target, back = torch.ones(1 << 20).pin_memory(), torch.zeros(1 << 20, device="cuda"), torch.empty(1 << 20)
    back = back.pin_memory()
    for value in range(2, 5):
        # Long enough that a copy which did not wait would come first.
        torch.cuda._sleep(20_000_000)
        target.fill_(value)
        brought = lane.copy(target, source, after=lane.here())
        brought.wait()
        target.add_(value)
        lane.copy(back, target, after=lane.here()).finish()
        assert bool((back == 1 + value).all())


def test_all_tensors_of_a_resident_model_are_what_a_cpu_finds_in_the_file(store: Path) -> None:
    base = open_model(store)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    ours = loaded(store, "resident", dtype=torch.bfloat16).module
    plain = load(base, architecture, dtype=torch.bfloat16, device=torch.device("cpu")).module
    found, expected = ([*module.named_parameters(), *module.named_buffers()] for module in (ours, plain))
    assert len(found) == len(expected) > 7 * BLOCKS
    for (name, one), (same, other) in zip(found, expected, strict=True):
        assert name == same
        assert one.is_cuda
        assert torch.equal(one.cpu(), other)
    storages = {tensor.untyped_storage().data_ptr() for _, tensor in found}
    # A buffer for each block, one for the rest, and one for the offsets, which are no tensors of the file.
    assert len(storages) == BLOCKS + 2


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize(("slots", "room"), [(2, 1 << 30), (3, 1 << 30), (2, 4 << 20), (2, 0)])
def test_a_streamed_model_trains_with_the_same_bits(  # noqa: PLR0917
    store: Path, monkeypatch: pytest.MonkeyPatch, slots: int, room: int, recompute: Recompute, together: int
) -> None:
    expected = trained(loaded(store, "resident"), recompute=recompute, together=together)
    monkeypatch.setattr(
        loading,
        "_layout",
        lambda _way, placed, *, device, note: StreamedLayout(placed, device=device, slots=slots, room=room, note=note),
    )
    model = loaded(store, "streamed")
    assert isinstance(model.residency, Ring)
    assert model.residency.held.count(None) == {1 << 30: 0, 4 << 20: BLOCKS - 2, 0: BLOCKS}[room]
    assert_equal(trained(model, recompute=recompute, together=together), expected)
    # Forward and backward, three times; at each turn some are still there.
    assert model.residency.blocks_brought == BLOCKS + (BLOCKS - slots) * 5


@pytest.mark.parametrize("pages", ["the file's own", "copied"])
def test_a_mapped_model_trains_with_the_same_bits(store: Path, monkeypatch: pytest.MonkeyPatch, pages: str) -> None:
    expected = trained(loaded(store, "resident"), recompute="all")
    if pages == "copied":
        hold = pinned.hold
        monkeypatch.setattr(
            pinned, "hold", lambda memory, *, read_only=False: None if read_only else hold(memory, read_only=False)
        )
    model = loaded(store, "mapped")
    layers = [part for part in model.module.modules() if isinstance(part, QuantizedLinear)]
    assert all(not part.codes.is_cuda and part.codes.is_pinned() and part.levels.is_cuda for part in layers)
    assert_equal(trained(model, recompute="all"), expected)


def test_a_streamed_model_takes_the_memory_of_two_blocks(store: Path) -> None:
    taken = {}
    for residency in ("resident", "streamed"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model = loaded(store, residency)
        torch.cuda.synchronize()
        taken[residency] = torch.cuda.memory_allocated() - before
        del model
    block = 0.516 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536)
    assert taken["resident"] - taken["streamed"] > (BLOCKS - 2.1) * block


def test_whole_runs_are_the_same_wherever_the_weights_live(store: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one and one is", "answer": " two"}\n' * 20)
    found = []
    for residency in ("resident", "streamed", "mapped", "auto"):
        out = tmp_path / residency
        words = ["finetune", str(store), "--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--out", str(out)]
        settings = ["--steps", "3", "--batch-size", "2", "--accumulate", "2", "--rank", "4", "--device", "cuda"]
        assert execute([*words, *settings, "--residency", residency]) == 0
        found.append((out / "final" / "adapter_model.safetensors").read_bytes())
    assert len(set(found)) == 1


def test_generation_gives_the_same_text(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for residency in ("resident", "streamed", "mapped"):
        capsys.readouterr()
        words = ["generate", str(store), "--prompt", "one", "--max-new-tokens", "9", "--device", "cuda"]
        assert execute([*words, "--residency", residency]) == 0
        found.append(capsys.readouterr().out)
    assert len(set(found)) == 1
