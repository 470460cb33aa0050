"""Where weights live changes nothing but where they live: losses and gradients to the last bit, on a CPU's stand-in.

The stand-in copies only when somebody waits, and what is on its way is NaN until then (qlora_pipe/lanes.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig, Recompute
from qlora_pipe.data.batches import IGNORE, Batch
from qlora_pipe.errors import ConfigError
from qlora_pipe.lanes import LateLane
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.linear import QuantizedLinear
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.residency import layout as layouts
from qlora_pipe.residency import pinned
from qlora_pipe.residency.layout import Layout, ResidentLayout, StreamedLayout
from qlora_pipe.residency.mapped import MappedLayout
from qlora_pipe.residency.ring import Ring
from qlora_pipe.stages import load as loading
from qlora_pipe.stages.load import load
from qlora_pipe.testing import tiny_checkpoint
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.loss import summed_loss
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt

CPU = torch.device("cpu")
CONFIG = FinetuneConfig(rank=3, dropout=0.1)
MakeLayout = Callable[..., Layout]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A store, or the checkpoint it is made from, of so many blocks; odd sizes, biases and a tied head in some."""
    folder = tmp_path_factory.mktemp("bases")

    def make(blocks: int, *, packed: bool = True, **overrides: Any) -> Path:
        name = "-".join(map(str, (blocks, *overrides.values())))
        source, store = folder / f"source-{name}", folder / f"store-{name}"
        if not source.exists():
            tiny_checkpoint(source, num_hidden_layers=blocks, **overrides)
            assert execute(["quantize", str(source), str(store)]) == 0
        return store if packed else source

    return make


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[MakeLayout], None]:
    """Let models be laid out by a function of the tensors, the device and the sentences' taker."""

    def use(make: MakeLayout) -> None:
        monkeypatch.setattr(loading, "_layout", lambda _way, placed, *, device, note: make(placed, device=device))

    return use


def streamed(slots: int) -> MakeLayout:
    return lambda placed, *, device: StreamedLayout(placed, device=device, slots=slots)


def loaded(folder: Path, residency: Any = "auto", *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    base = open_model(folder)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    return load(base, architecture, dtype=dtype, device=CPU, residency=residency)


def adapted(folder: Path, residency: Any = "auto", *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model with adapters that do something, in training."""
    model = loaded(folder, residency, dtype=dtype)
    torch.manual_seed(3)
    adapt(model, CONFIG, start=None)
    for layer in adapters_of(model.module).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    model.module.train()
    return model


def batches(count: int = 1) -> list[Batch]:
    draws = torch.Generator().manual_seed(5)
    found = []
    for number in range(count):
        ids = torch.randint(3, 200, (2, 7 + number), generator=draws)
        labels = ids.roll(-1, 1)
        labels[:, -1] = IGNORE
        trained = int(labels.ne(IGNORE).sum())
        found.append(Batch(ids=ids, labels=labels, tokens=ids.numel(), trained=trained, origins=("row",)))
    return found


def work(model: LoadedModel, *, recompute: Recompute, steps: int = 2, together: int = 1) -> list[Tensor]:
    """Losses and gradients of a few steps, with an evaluation in between: all that training sees of a model."""
    passes = BlockwisePass(model, recompute=RecomputePlan(recompute))
    torch.manual_seed(11)
    found = []
    for _ in range(steps):
        found += passes.run(batches(together), divisor=10.0)
        model.module.eval()
        with torch.no_grad():
            found += [summed_loss(model, batch) for batch in batches(2)]
        model.module.train()
    parts = [part for layer in adapters_of(model.module).values() for part in (layer.lora_a, layer.lora_b)]
    return found + [part.grad for part in parts if part.grad is not None]


class Held:
    """Memory that a driver would hold."""

    def __init__(self, memory: Tensor) -> None:
        self.bytes = memory


def ring_of(model: LoadedModel) -> Ring:
    assert isinstance(model.residency, Ring)
    return model.residency


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(bool(torch.isfinite(one).all()) for one in ours)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_a_streamed_model_trains_and_evaluates_with_the_same_bits(
    bases: Callable[..., Path], laid_out: Callable[[MakeLayout], None], blocks: int, slots: int, recompute: Recompute
) -> None:
    expected = work(adapted(bases(blocks)), recompute=recompute)
    laid_out(streamed(slots))
    assert_equal(work(adapted(bases(blocks), "streamed"), recompute=recompute), expected)


@pytest.mark.parametrize("recompute", ["all", "none", "auto"])
@pytest.mark.parametrize("packed", [True, False], ids=["store", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_converts_what_is_computed_in_another_type(
    bases: Callable[..., Path], packed: bool, dtype: torch.dtype, recompute: Recompute
) -> None:
    folder = bases(3, packed=packed, intermediate_size=73, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    expected = work(adapted(folder, dtype=dtype), recompute=recompute)
    model = adapted(folder, "streamed", dtype=dtype)
    assert model.residency.way == "streamed"
    assert_equal(work(model, recompute=recompute), expected)


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize("recompute", ["all", "none"])
def test_several_batches_go_through_each_block_together_with_the_same_bits(
    bases: Callable[..., Path], recompute: Recompute, together: int
) -> None:
    expected = work(adapted(bases(5)), recompute=recompute, together=together)
    model = adapted(bases(5), "streamed")
    assert model.residency.prefers_layer_major
    assert_equal(work(model, recompute=recompute, together=together), expected)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2), (3, 2), (3, 3), (5, 2), (5, 3), (7, 4)], ids=str)
def test_a_step_brings_each_block_once_per_direction_and_those_at_the_turns_once(
    bases: Callable[..., Path],
    laid_out: Callable[[MakeLayout], None],
    sizes: tuple[int, int],
    recompute: Recompute,
    together: int,
) -> None:
    blocks, slots = sizes
    laid_out(streamed(slots))
    model = adapted(bases(blocks), "streamed")
    ring = ring_of(model)
    passes = BlockwisePass(model, recompute=RecomputePlan(recompute))
    passes.run(batches(), divisor=10.0)
    # Forward all of them, backward those that have left: the last ones are still there.
    assert ring.blocks_brought == blocks + max(0, blocks - slots)
    before, before_bytes = ring.blocks_brought, ring.bytes_brought
    passes.run(batches(together), divisor=10.0)
    # The first ones are still there, too, whatever the number of batches.
    assert ring.blocks_brought - before == 2 * max(0, blocks - slots)
    one = ring.bytes_brought // ring.blocks_brought
    assert ring.bytes_brought - before_bytes == one * 2 * max(0, blocks - slots)


def test_an_evaluation_begins_with_the_first_block_again_before_the_last_one_ends(bases: Callable[..., Path]) -> None:
    model = loaded(bases(5), "streamed")
    ring = ring_of(model)
    with torch.no_grad():
        for _ in range(3):
            summed_loss(model, batches()[0])
    # 5 blocks are an odd number: the first takes the last one's own slot, and comes when that has computed.
    assert ring.blocks_brought == 3 * 5


def test_the_blocks_come_from_held_host_memory_as_far_as_there_is_room(
    bases: Callable[..., Path], laid_out: Callable[[MakeLayout], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = work(adapted(bases(5)), recompute="none")
    held: list[int] = []

    def hold(memory: Tensor, *, read_only: bool = False) -> Held:
        held.append(memory.numel())
        return Held(memory)

    monkeypatch.setattr(pinned, "hold", hold)
    laid_out(lambda placed, *, device: StreamedLayout(placed, device=device, room=1 << 30))
    model = adapted(bases(5), "streamed")
    assert len(held) == 5
    assert_equal(work(model, recompute="none"), expected)
    room = 3 * held[0]
    held.clear()
    laid_out(lambda placed, *, device: StreamedLayout(placed, device=device, room=room))
    model = adapted(bases(5), "streamed")
    assert len(held) == 3
    assert_equal(work(model, recompute="none"), expected)


@pytest.mark.parametrize("pages", ["the files' own", "copied"])
def test_a_mapped_model_reads_its_codes_and_scales_from_held_memory(
    bases: Callable[..., Path], laid_out: Callable[[MakeLayout], None], monkeypatch: pytest.MonkeyPatch, pages: str
) -> None:
    expected = work(adapted(bases(2)), recompute="none")
    held: list[Tensor] = []

    def hold(memory: Tensor, *, read_only: bool = False) -> Held | None:
        if read_only and pages == "copied":
            return None
        held.append(memory)
        return Held(memory)

    monkeypatch.setattr(pinned, "hold", hold)
    laid_out(lambda placed, *, device: MappedLayout(placed, device=device, room=1 << 30))
    model = adapted(bases(2), "streamed")
    assert model.residency.way == "mapped"
    assert len(held) == (2 if pages == "copied" else 1)
    memory = {tensor.untyped_storage().data_ptr() for tensor in held}
    for layer in (part for part in model.module.modules() if isinstance(part, QuantizedLinear)):
        inside = {name for name, part in layer.named_buffers() if part.untyped_storage().data_ptr() in memory}
        assert inside == {"codes", "absmax"}
    assert_equal(work(model, recompute="none"), expected)


def test_mapped_is_refused_where_nothing_is_packed_or_no_memory_is_held(
    bases: Callable[..., Path], laid_out: Callable[[MakeLayout], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "hold", lambda _memory, **_: None)
    laid_out(lambda placed, *, device: MappedLayout(placed, device=device, room=1 << 30))
    with pytest.raises(ConfigError, match="is for weights in 4 bits, and this base has none: use streamed"):
        loaded(bases(2, packed=False), "streamed")
    with pytest.raises(ConfigError, match=r"asks for 0\.0 GB of host memory .* does not give that much: use streamed"):
        loaded(bases(2), "streamed")


def test_a_resident_model_comes_through_a_few_pinned_pieces_with_the_same_bits(
    bases: Callable[..., Path], laid_out: Callable[[MakeLayout], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bases(2)
    expected = work(adapted(folder), recompute="none")

    class SmallFeeder(layouts.Feeder):
        def __init__(self, lane: LateLane, device: torch.device) -> None:
            # Of no power of two, so that tensors are cut anywhere.
            super().__init__(lane, device, threads=3, piece_bytes=1000)

    monkeypatch.setattr(layouts, "Feeder", SmallFeeder)
    laid_out(lambda placed, *, device: ResidentLayout(placed, device=device))
    model = adapted(folder, "streamed")
    assert model.residency.way == "resident"
    storages = {part.untyped_storage().data_ptr() for part in (*model.module.parameters(), *model.module.buffers())}
    lora = {
        part.untyped_storage().data_ptr()
        for layer in adapters_of(model.module).values()
        for part in (layer.lora_a, layer.lora_b)
    }
    # A buffer for each block, one for the rest, and one for the offsets, which are no tensors of the file.
    assert len(storages - lora) == 2 + 1 + 1
    assert_equal(work(model, recompute="none"), expected)


def test_reading_that_fails_is_told_where_the_block_is_asked_for(bases: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    for file in bases(5).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = loaded(folder, "streamed")
    with torch.no_grad():
        summed_loss(model, batches()[0])
        shard = folder / "model.safetensors"
        with shard.open("r+b") as file:
            file.truncate(4096)
        for _ in range(2):
            with pytest.raises(Exception, match="has changed its size since it was opened"):
                summed_loss(model, batches()[0])
